"""One rank of a training job, started by torchrun.

    torchrun --nproc-per-node 2 -m nodes.worker --out RUN --exchange allreduce --steps 20
    torchrun --nproc-per-node 2 -m nodes.worker --out RUN --servers tcp://127.0.0.1:5555
    torchrun --nproc-per-node 2 -m nodes.worker --config RUN --resume

Reads rank and world size from torchrun's environment. Without `--servers`, the ranks of a ZeroMQ exchange serve the
shards themselves.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated

import tyro
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from harness.config import TrainConfig, read_config, write_config
from harness.errors import ConfigError, GradtapError
from harness.models import ModelError
from harness.types import Gradients
from nodes.console import console


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class WorkerConfig:
    """One rank of a training job; start it with torchrun."""

    train: Annotated[TrainConfig, tyro.conf.arg(name="")] = dataclasses.field(default_factory=TrainConfig)
    """What to train, and how."""
    out: Path | None = None
    """Run folder to write; it is made where it is missing."""
    servers: str = ""
    """Endpoints of the parameter servers, in order of their shards, with commas between; empty: the ranks serve."""
    host: str = "127.0.0.1"
    """Address of this rank by which the others reach it, where ranks serve; it listens there and nowhere else."""
    keys: Path | None = None
    """Folder with this rank's keys, as `gradtap keys` makes them: the exchange zeromq is then encrypted by CURVE."""
    resume: bool = False
    """Go on from the last checkpoint of the run folder."""


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        config = parse(arguments)
        run(config)
    except (GradtapError, ModelError, OSError) as error:
        console.print(f"rank {os.environ.get('RANK', '?')}: {error}", markup=False)
        return 2 if isinstance(error, (ConfigError, ModelError)) else 1
    except KeyboardInterrupt:
        return 130
    return 0


def parse(arguments: list[str]) -> WorkerConfig:
    """`--config RUN` takes the options of that folder's config.json; those that are given beside it win.

    Not `--run`: torchrun would read that as short for its own `--run-path`.
    """
    default = WorkerConfig()
    if "--config" in arguments:
        at = arguments.index("--config")
        folder = Path(*arguments[at + 1 : at + 2])
        default = WorkerConfig(train=read_config(folder), out=folder)
        del arguments[at : at + 2]
    return tyro.cli(WorkerConfig, args=arguments, default=default, prog="torchrun ... -m nodes.worker")


def run(config: WorkerConfig) -> None:
    """Trains this rank to the end. Raises: GradtapError."""
    from harness.exchange import connect  # torch takes a second to import: not for --help
    from harness.training import Trainer

    rank, world_size = _place()
    if config.resume and config.out is None:
        raise ConfigError("resume: wanted --config RUN or --out RUN, the folder that holds the checkpoints")
    trainer = Trainer(config.train, rank=rank, world_size=world_size)
    if config.out is not None:
        if config.resume:
            trainer.resume(config.out)
        if rank == 0:
            write_config(config.out, trainer.config, world_size=world_size)
    servers = [endpoint for endpoint in config.servers.split(",") if endpoint]
    with (
        connect(
            config.train.exchange,
            device=trainer.device,
            servers=servers,
            deadline_s=config.train.deadline_s,
            host=config.host,
            keys=config.keys,
        ) as exchange,
        _progress(config.train.steps, first=trainer.steps_done, show=rank == 0) as tell,
    ):
        trainer.train(exchange, run=config.out, progress=tell)
        if rank == 0 and trainer.accountant:
            console.print(str(trainer.accountant.spent(trainer.steps_done)), markup=False)


def _place() -> tuple[int, int]:
    try:
        return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    except (KeyError, ValueError):
        raise ConfigError(
            "RANK and WORLD_SIZE are not set: start it with torchrun --nproc-per-node N -m nodes.worker ..."
        ) from None


@contextlib.contextmanager
def _progress(steps: int, *, first: int, show: bool) -> Iterator[Callable[[int, Gradients], None]]:
    """A bar with the time left on a terminal; elsewhere a line at powers of two and at the end."""
    if not show:
        yield lambda step, gradients: None
        return
    columns = (
        TextColumn("training"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[loss]}"),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("training", total=steps, completed=first, loss="")

        def tell(step: int, gradients: Gradients) -> None:
            text = f"loss {gradients.loss:.4f}"
            bar.update(task, completed=step + 1, loss=text)
            done = step + 1
            if not console.is_terminal and (done == steps or done & (done - 1) == 0):
                console.print(f"step {done} of {steps}, {text}", markup=False)

        yield tell


if __name__ == "__main__":
    sys.exit(main())
