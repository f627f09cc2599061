"""The errors of processes and networks, as distinct from what they carry.

    GradtapError (harness.errors)
    └── NodeError          a process, or what it needs of its host, failed
        ├── RecordError    the tap cannot listen, or cannot write what it heard
        └── NetworkError   the kernel does not grant the private network, or a part of it

Every message is one line: where, wanted, got, what to do.
"""

from harness.errors import GradtapError


class NodeError(GradtapError):
    """A process, or what it needs of its host, failed."""


class RecordError(NodeError):
    """The tap cannot listen, or cannot write what it heard."""


class NetworkError(NodeError):
    """The kernel does not grant the private network, or a part of it."""
