"""The eavesdropper's desk: capture -> streams -> observations -> reconstructions -> report. Never sees the truth."""
