"""The errors of the honest side, and what each one blames.

    GradtapError
    ├── ConfigError        a person set something that cannot be (also a ValueError)
    ├── DataError          a data set is missing, damaged or of another format
    ├── CheckpointError    a checkpoint is missing, damaged or of another run
    ├── DefenseError       a gradient cannot be defended as it was asked for
    └── ExchangeError      the exchange with the peers failed
        ├── DeadlineError  a peer did not answer in time; names rank, step, wanted and got
        └── PeerError      a peer said something that it must not say, or said that it failed

Every message is one line: where, wanted, got, what to do. `harness.wire` is a leaf and has its own `WireError`.
"""


class GradtapError(Exception):
    """Something that a person should read as one line, without a traceback."""


class ConfigError(GradtapError, ValueError):
    """A setting that cannot be."""


class DataError(GradtapError):
    """A data set that is missing, damaged or of another format."""


class CheckpointError(GradtapError):
    """A checkpoint that is missing, damaged or of another run."""


class DefenseError(GradtapError):
    """A gradient that cannot be defended as it was asked for."""


class ExchangeError(GradtapError):
    """The exchange with the peers failed."""


class DeadlineError(ExchangeError):
    """A peer did not answer within the deadline."""


class PeerError(ExchangeError):
    """A peer broke the protocol, or reported its own failure."""
