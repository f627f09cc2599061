"""The errors of the eavesdropper's side.

    TapError
    ├── CaptureError   a file is not a capture, or is one that cannot be read further
    ├── DecodeError    bytes are not what the format says; the only class that a decoder lets out, for any bytes at all
    ├── AttackError    an attack was asked for something that cannot be (a model that does not fit the observation, ...)
    └── AnswerError    an answer could not be made, or its files or the truth beside them are missing or damaged

A hole in a capture is none of these: it is a `Gap` event, and decoding goes on at the next boundary that can be proven.
"""


class TapError(Exception):
    """Something that a person should read as one line, without a traceback."""


class CaptureError(TapError):
    """Not a capture file, or one that is damaged beyond its last good packet."""


class DecodeError(TapError):
    """Bytes that are not what the protocol's specification allows; names the flow and the offset."""


class AttackError(TapError, ValueError):
    """An attack that cannot be started with what it was given."""


class AnswerError(TapError):
    """An attack's answer that could not be made, or files of it, or of the truth beside it, missing or damaged."""
