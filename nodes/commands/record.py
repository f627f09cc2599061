"""`gradtap record`: records an interface for a job that runs elsewhere."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from harness.errors import ConfigError
from nodes.commands.base import Command, Result
from nodes.console import console
from nodes.tap import TapConfig, record, stopped_by_signals


@dataclasses.dataclass(frozen=True, kw_only=True)
class Record(Command):
    """Record this host's network interfaces, for a job that runs outside of the lab. Nothing is sent.

    The recording holds whatever else the interface carries, so it needs --on-this-host, and the right to listen
    (CAP_NET_RAW; root has it).
    """

    interface: tuple[str, ...]
    """Interfaces to record, by name, such as lo or eth0."""
    out: Path
    """The capture file to write (pcapng)."""
    on_this_host: bool = False
    """Yes, record this host's own interfaces."""
    incoming_only: bool = False
    """Leave out what this host sends. Loopback is always recorded so: what is sent on it arrives on it."""
    seconds: float | None = None
    """How long; otherwise until Ctrl-C."""
    ring_mib: int | None = None
    """Memory for packets that are not yet written, in MiB; otherwise an eighth of what is available, at most 1024."""
    overwrite: bool = False
    """Replace the file if it is there."""

    def run(self) -> Result:
        if not self.on_this_host:
            raise ConfigError(
                f"record: {', '.join(self.interface)} is this host's own, and may carry more than your job: add"
                " --on-this-host if you mean it and may listen to it, or run the job in `gradtap lab`"
            )
        if self.out.exists() and not self.overwrite:
            raise ConfigError(f"record: {self.out} is there already; name another file, or add --overwrite")
        config = TapConfig(
            interfaces=self.interface,
            out=self.out,
            incoming_only=self.incoming_only,
            ring_mib=self.ring_mib,
            seconds=self.seconds,
        )
        until = "Ctrl-C" if self.seconds is None else f"{self.seconds:g} s have passed"
        told = f"recording {', '.join(self.interface)} until {until}"
        with stopped_by_signals() as stop:
            heard = record(config, stop=stop, ready=lambda _: console.print(told, markup=False))
        return Result(
            json={"capture": str(self.out), "exit_codes": {}} | dataclasses.asdict(heard),
            text=f"{heard.packets} packets, {heard.bytes} bytes, {heard.dropped} dropped: {self.out}",
        )
