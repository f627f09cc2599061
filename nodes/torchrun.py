"""torchrun: how a job of several ranks is started, on one host or on one host a rank, and what it says of a failure.

In: the arguments of a torchrun command. Out: nodes. Refuses to know what the script does.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path

from harness.errors import ConfigError
from nodes.network import address
from nodes.node import Node, signal_name

TORCHRUN = (sys.executable, "-P", "-m", "torch.distributed.run")
"""The torchrun of this interpreter, wherever PATH leads."""

MASTER_PORT = 29_500
"""torchrun's own default; a private network has no other user of it."""

FLAGS = frozenset({"--standalone", "-m", "--module", "--no-python", "--run-path", "--virtual-local-rank"})
"""torchrun's options that take no value; every other one takes one."""

PLACEMENT = frozenset(
    {"--standalone", "--nnodes", "--nproc-per-node", "--node-rank", "--master-addr", "--master-port", "--local-addr"}
    | {f"--rdzv-{name}" for name in ("backend", "endpoint", "id", "conf")}
)
"""torchrun's options that say where ranks run and how they meet: what the lab decides where each has a host."""


def host_names(num_ranks: int) -> tuple[str, ...]:
    """The hosts of a job with one host a rank."""
    return tuple(f"rank{rank}" for rank in range(num_ranks))


def start_together(
    arguments: Sequence[str], *, num_ranks: int, env: dict[str, str], master_port: int = MASTER_PORT
) -> tuple[Node, ...]:
    """All ranks on one host, under one torchrun."""
    place = ("--nproc-per-node", str(num_ranks), "--master-addr", "127.0.0.1", "--master-port", str(master_port))
    return (Node(name="workers", argv=(*TORCHRUN, *place, *arguments), env=env),)


def start_apart(
    arguments: Sequence[str], *, num_ranks: int, env: dict[str, str], launcher: Sequence[str] = TORCHRUN
) -> tuple[Node, ...]:
    """Each rank on a host of its own, under a torchrun of its own."""
    meet = ("--nproc-per-node", "1", "--master-addr", address(0), "--master-port", str(MASTER_PORT))
    return tuple(
        Node(
            name=host,
            argv=(*launcher, "--nnodes", str(num_ranks), "--node-rank", str(rank), *meet, *arguments),
            env=env,
            host=host,
        )
        for rank, host in enumerate(host_names(num_ranks))
    )


def split_launcher(argv: Sequence[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Takes a command apart: torchrun, and its arguments. Raises: ConfigError where it is another command."""
    for at, token in enumerate(argv[:4]):
        if Path(token).name == "torchrun" or (token == "torch.distributed.run" and argv[at - 1] == "-m"):
            return tuple(argv[: at + 1]), tuple(argv[at + 1 :])
    raise ConfigError(f"--hosts: wanted a torchrun command, to start it on each host, got: {' '.join(argv)}")


def split_placement(arguments: Sequence[str]) -> tuple[int, tuple[str, ...]]:
    """Takes a torchrun command line apart: how many ranks it wants, and what is left to say of each.

    Args:
        arguments: what follows `torchrun`.

    Raises: ConfigError where the number of ranks is not a number.
    """
    placement = {"--nnodes": "1", "--nproc-per-node": "1"}
    kept: list[str] = []
    rest = list(arguments)
    while rest and rest[0].startswith("-"):
        token = rest.pop(0)
        name, equals, value = token.partition("=")
        option = name if not name.startswith("--") else name.replace("_", "-")
        tokens = [token]
        if option not in FLAGS and not equals:
            if not rest:
                raise ConfigError(f"torchrun {name}: wanted a value, got nothing")
            value = rest.pop(0)
            tokens.append(value)
        if option in PLACEMENT:
            placement[option] = value
        else:
            kept += tokens
    num_ranks = 1
    for option in ("--nnodes", "--nproc-per-node"):
        if not placement[option].isdigit() or int(placement[option]) < 1:
            raise ConfigError(f"--hosts: torchrun {option}: wanted a number of 1 or more, got {placement[option]}")
        num_ranks *= int(placement[option])
    return num_ranks, (*kept, *rest)


def root_cause(lines: Sequence[str]) -> str | None:
    """What torchrun's report on a failed job names as its first failure; None where there is no such report."""
    heading = [at for at, line in enumerate(lines) if line.startswith("Root Cause")]
    if not heading:
        return None
    matches = (re.match(r"\s*(\w+)\s*: (-?\w+)", line) for line in lines[heading[-1] :])
    fields = {match[1]: match[2] for match in matches if match is not None}
    if not {"rank", "exitcode"} <= fields.keys():
        return None
    code = int(fields["exitcode"])
    how = f"was killed by {signal_name(-code)}" if code < 0 else f"ended with exit code {code}"
    # Torch marks what a rank prints once it has joined, and this project's worker all that it says.
    own = re.compile(rf"(\[rank{fields['rank']}\]|rank {fields['rank']}): \S")
    any_rank = re.compile(r"(?!torch\.distributed\.elastic)[\w.]+(Error|Exception): ")
    said = [line for pattern in (any_rank, own) for line in lines[: heading[-1]] if pattern.match(line)]
    return f"torchrun says that rank {fields['rank']} failed first: it {how}" + (f" ({said[-1]})" if said else "")
