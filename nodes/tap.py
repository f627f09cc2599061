"""The tap: a passive recorder of network interfaces.

In: names of interfaces. Out: a pcapng file of every packet seen, with kernel time stamps, and of how many were dropped.
Refuses to send, and to know what a packet says.

    python -m nodes.tap --interface lo --out wire.pcapng

prints `{"ready": true, ...}` as one line once no packet can be missed, records until SIGTERM or SIGINT, writes what is
still in the ring, and prints `{"packets": ..., "bytes": ..., "dropped": ...}`.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import errno
import json
import math
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from attack.capture.pcapng import PcapngWriter
from harness.errors import ConfigError
from nodes.errors import RecordError
from nodes.ring import RETIRE_MS, SNAPLEN, Ring

LINK_TYPE_ETHERNET = 1
"""What AF_PACKET hands over of loopback, veth and Ethernet; the other hardware types are refused."""
HARDWARE_TYPES = {1: "Ethernet", 772: "loopback"}

LARGEST_RING = 1 << 30
"""Holds a burst of 800 MB even where the writer gets no time at all; more delays the start by seconds."""
DRAIN_S = 5.0
"""Longest wait for packets of which the kernel says that they are in the ring; it hands them over in RETIRE_MS."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TapConfig:
    """What to record, and where to."""

    interfaces: tuple[str, ...]
    """Names of interfaces, such as `lo`; the file numbers them in this order."""
    out: Path
    """The pcapng file; it is overwritten."""
    incoming_only: bool = False
    """Record only what arrives through an interface, not what leaves. Loopback, where all that leaves arrives, is
    always recorded so."""
    ring_mib: int | None = None
    """Memory in which the kernel keeps packets until they are written, in MiB, for all interfaces together. None takes
    an eighth of what is available, at most 1024."""
    seconds: float | None = None
    """Record for this long. None records until SIGTERM or SIGINT."""

    def __post_init__(self) -> None:
        """Raises: ConfigError."""
        if not self.interfaces:
            raise ConfigError("interface: wanted at least one, got none")
        if self.ring_mib is not None and self.ring_mib < 1:
            raise ConfigError(f"ring_mib: wanted 1 MiB or more, got {self.ring_mib}")
        if self.seconds is not None and not self.seconds > 0:
            raise ConfigError(f"seconds: wanted more than 0, got {self.seconds:g}")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TapResult:
    """What a tap heard."""

    packets: int
    """Packets in the file."""
    bytes: int
    """Their bytes, link headers included."""
    dropped: int
    """Packets that arrived and are not in the file, because the ring was full."""


def record(config: TapConfig, *, stop: int, ready: Callable[[int], None] = lambda ring_bytes: None) -> TapResult:
    """Records until `stop` or the end of `config.seconds`.

    Args:
        stop: a descriptor that becomes readable when the recording is to end, such as that of `stopped_by_signals`.
        ready: called, with the size of the ring, once no packet can be missed.

    Raises: RecordError.
    """
    with contextlib.ExitStack() as stack:
        rings = _open_rings(config, stack)
        file = stack.enter_context(create(config.out))
        ready(sum(ring.num_bytes for ring in rings))
        return _Recorder(config, rings, file).run(stop)


@contextlib.contextmanager
def stopped_by_signals(*, until_exit: bool = False) -> Iterator[int]:
    """A descriptor that becomes readable with SIGTERM or SIGINT, which otherwise do nothing inside the block.

    Args:
        until_exit: they do nothing after the block either, so that a process ends with its own exit code.
    """
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    before = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGTERM, signal.SIGINT)}
    descriptor = signal.set_wakeup_fd(writing)
    try:
        yield reading
    finally:
        signal.set_wakeup_fd(descriptor)
        for number, handler in before.items():
            signal.signal(number, signal.SIG_IGN if until_exit else handler)
        os.close(reading)
        os.close(writing)


class _Recorder:
    """Moves packets from the rings to the file."""

    def __init__(self, config: TapConfig, rings: list[Ring], file: BinaryIO) -> None:
        self.config, self.rings, self.file = config, rings, file
        self.packets = self.bytes = 0

    def run(self, stop: int) -> TapResult:
        complete = 0
        try:
            writer = PcapngWriter(
                self.file, interfaces=[(ring.interface, LINK_TYPE_ETHERNET) for ring in self.rings], snaplen=SNAPLEN
            )
            for _ in self._turns(stop):
                complete = self.file.tell()
                self._write_all(writer)
            complete = self.file.tell()
            dropped = 0
            for ring in self.rings:
                received = ring.count().received
                missed = received - ring.packets_read
                writer.statistics(ring.number, received=received, dropped=missed)
                dropped += missed
        except OSError as error:
            # A full disk still lets a file be cut: what is left ends with a whole packet.
            with contextlib.suppress(OSError):
                self.file.truncate(complete)
            raise unwritable(self.config.out, error) from error
        self._refuse_losses()
        return TapResult(packets=self.packets, bytes=self.bytes, dropped=dropped)

    def _turns(self, stop: int) -> Iterator[None]:
        """Yields whenever there may be something to write; after the end, until the rings are drained."""
        poll = select.poll()
        poll.register(stop, select.POLLIN)
        for ring in self.rings:
            poll.register(ring, select.POLLIN)
        end = math.inf if self.config.seconds is None else time.monotonic() + self.config.seconds
        going_on = True
        while going_on:
            patience_s = max(0.0, end - time.monotonic())
            ready = dict(poll.poll(None if patience_s == math.inf else patience_s * 1000))
            # An interface that was taken down or away reports it for ever, and no more packets.
            failed = any(events & (select.POLLERR | select.POLLHUP) for events in ready.values())
            going_on = bool(ready) and stop not in ready and not failed
            yield
        for ring in self.rings:
            ring.stop()
        packets, end = -1, 0.0
        while not all(ring.drained for ring in self.rings):
            if self.packets > packets:
                packets, end = self.packets, time.monotonic() + DRAIN_S
            elif time.monotonic() > end:
                return
            time.sleep(RETIRE_MS / 1000)
            yield

    def _refuse_losses(self) -> None:
        for ring in self.rings:
            if number := ring.error():
                raise RecordError(
                    f"interface {ring.interface}: went away while it was recorded: {os.strerror(number)};"
                    f" what was recorded until then is in {self.config.out}"
                )

    def _write_all(self, writer: PcapngWriter) -> None:
        for ring in self.rings:
            for block in ring.blocks():
                writer.write(block)
                self.packets += len(block)
                self.bytes += sum(len(data) for _, _, data, _ in block)


def _open_rings(config: TapConfig, stack: contextlib.ExitStack) -> list[Ring]:
    if not hasattr(socket, "AF_PACKET"):
        raise RecordError(
            f"recording needs Linux (AF_PACKET), got {sys.platform}; record there, or give a capture file"
        )
    total = LARGEST_RING if config.ring_mib is None else config.ring_mib << 20
    if config.ring_mib is None:
        total = min(total, _available_memory() // 8)
    rings = []
    for number, interface in enumerate(config.interfaces):
        try:
            ring = Ring(
                interface,
                number=number,
                num_bytes=total // len(config.interfaces),
                incoming_only=config.incoming_only,
            )
        except PermissionError as error:
            raise RecordError(
                f"interface {interface}: recording needs CAP_NET_RAW, which this process has not;"
                " run it as root, or inside `gradtap lab`, which needs no root"
            ) from error
        except OSError as error:
            if error.errno == errno.ENODEV:
                names = ", ".join(name for _, name in socket.if_nameindex())
                raise RecordError(f"interface {interface}: there is none of this name; there are: {names}") from error
            raise RecordError(f"interface {interface}: cannot be recorded: {reason(error)}") from error
        stack.callback(ring.close)
        if ring.hardware_type not in HARDWARE_TYPES:
            raise RecordError(
                f"interface {interface}: wanted {' or '.join(HARDWARE_TYPES.values())},"
                f" got hardware type {ring.hardware_type}; record the interface that carries it"
            )
        rings.append(ring)
    return rings


def _available_memory() -> int:
    """Bytes that can be had without swapping."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) << 10
    return LARGEST_RING


def create(out: Path) -> BinaryIO:
    """Opens a capture file to write. Raises: RecordError."""
    try:
        return open(out, "wb", buffering=0)
    except OSError as error:
        raise RecordError(f"{out}: cannot be created: {reason(error)}") from error


def unwritable(out: Path, error: OSError) -> RecordError:
    """What to say when a capture file takes no more."""
    return RecordError(f"{out}: cannot be written: {reason(error)}; what was recorded until then can be read")


def reason(error: OSError) -> str:
    """The system's words for it, and its short name."""
    return f"{error.strerror} ({errno.errorcode.get(error.errno or 0, '?')})"


def say(fields: dict[str, Any]) -> None:
    """Prints one JSON object as one line of standard output."""
    print(json.dumps(fields), flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m nodes.tap", description="Record network interfaces, passively.")
    parser.add_argument("--interface", action="append", required=True, help="name of an interface; may be repeated")
    parser.add_argument("--out", type=Path, required=True, help="the pcapng file to write")
    parser.add_argument("--incoming-only", action="store_true", help="leave out what leaves through an interface")
    parser.add_argument("--ring-mib", type=int, help="memory for packets not yet written, in MiB")
    parser.add_argument("--seconds", type=float, help="how long to record; otherwise until SIGTERM or SIGINT")
    options = parser.parse_args()
    config = TapConfig(
        interfaces=tuple(options.interface),
        out=options.out,
        incoming_only=options.incoming_only,
        ring_mib=options.ring_mib,
        seconds=options.seconds,
    )
    with stopped_by_signals(until_exit=True) as stop:
        try:
            result = record(config, stop=stop, ready=lambda ring_bytes: say({"ready": True, "ring_bytes": ring_bytes}))
        except RecordError as error:
            print(f"tap: {error}", file=sys.stderr, flush=True)
            return 1
        say(dataclasses.asdict(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
