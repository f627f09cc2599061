"""One small file a command of `gradtap`; importing one does nothing."""
