"""The `gradtap` program: reads the options, runs one command, prints its result, ends 0, 1 or 2."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import re
import sys
from collections.abc import Sequence

import tyro

from attack.errors import AttackError, TapError
from harness.errors import ConfigError, GradtapError
from harness.models import ModelError
from nodes.commands.base import Command, Result
from nodes.commands.bench import BENCHMARKS
from nodes.console import console
from nodes.memory import keep_freed_memory

COMMANDS = {
    "demo": "Demo",
    "lab": "Lab",
    "keys": "Keys",
    "record": "Record",
    "tunnel": "TunnelCommand",
    "inspect": "Inspect",
    "decode": "Decode",
    "attack": "Attack",
    "evaluate": "Evaluate",
    "frontier": "Frontier",
    "bench": "Bench",
}
"""Each command is the class of that name in `nodes.commands.<command>`."""


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0 success, 1 it ran and failed, 2 wrong use."""
    keep_freed_memory()
    arguments = list(sys.argv[1:] if argv is None else argv)
    at = arguments.index("--") if "--" in arguments else len(arguments)
    arguments, rest = arguments[:at], tuple(arguments[at + 1 :])
    try:
        command = parse(arguments)
        if rest:
            command = command.with_command(rest)
        result = command.run()
    except (ConfigError, ModelError, AttackError) as error:
        return fail(error, code=2)
    except (GradtapError, TapError, OSError) as error:
        return fail(error, code=1)
    except KeyboardInterrupt as interrupt:
        return fail(str(interrupt) or "interrupted", code=130)
    show(result, as_json=command.json)
    return 0 if result.ok else 1


def parse(arguments: Sequence[str]) -> Command:
    """The command that the arguments name. Exits with 2 and a helpful line where they are wrong."""
    if arguments[:1] == ["bench"]:
        return _choose(BENCHMARKS, "nodes.benchmarks", arguments[1:], program="gradtap bench")
    return _choose(COMMANDS, "nodes.commands", arguments, program="gradtap")


def _choose(commands: dict[str, str], package: str, arguments: Sequence[str], *, program: str) -> Command:
    # Only the named command's module is imported: torch takes seconds, and --help must not.
    names = [name for name in commands if arguments and arguments[0] == name] or list(commands)
    classes = {name: getattr(importlib.import_module(f"{package}.{name}"), commands[name]) for name in names}
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.extras.subcommand_cli_from_dict(classes, prog=program, args=list(arguments))
    except SystemExit as end:
        if end.code:
            fail(one_line(said.getvalue()), code=2)
        raise


def one_line(box: str) -> str:
    """What tyro draws as a titled box of several lines, as the one line that an error is here."""
    # The box is of line-drawing characters, or of dashes where the terminal has none.
    lines = [line.strip("\u2502\u256d\u256e\u2570\u256f\u2500 ") for line in box.splitlines()]
    _title, *said = [line for line in lines if line.strip("-")] or ["", box]
    return re.sub(r"(\w|\))\s+(For full helptext|Argument helptext|Perhaps you)", r"\1. \2", " ".join(said))


def show(result: Result, *, as_json: bool) -> None:
    """Prints a command's result on standard output."""
    if not result.quiet:
        print(json.dumps(result.json, allow_nan=False) if as_json else result.text, flush=True)


def fail(error: BaseException | str, *, code: int) -> int:
    """Prints one line about what went wrong, and returns the exit code."""
    console.print(f"gradtap: {error}", markup=False)
    return code


if __name__ == "__main__":
    sys.exit(main())
