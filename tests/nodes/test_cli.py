"""The command line: wrong use is one helpful line and ends 2, what fails ends 1, and --json prints one object."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from attack.capture.packets import LINK_ETHERNET
from attack.capture.pcapng import PcapngWriter
from nodes.cli import COMMANDS, main
from nodes.commands.bench import BENCHMARKS


def complaint(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that a failed command leaves on standard error; nothing stands on standard output."""
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("gradtap: "), (out, err)
    return err


def ended(*argv: str) -> int:
    try:
        return main(argv)
    except SystemExit as end:
        assert isinstance(end.code, int)
        return end.code


@pytest.mark.parametrize(
    "command", [[name] for name in COMMANDS if name != "bench"] + [["bench", b] for b in BENCHMARKS]
)
def test_every_command_has_help(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert ended(*command, "--help") == 0
    assert "--json" in capsys.readouterr().out


def test_bench_names_every_benchmark(capsys: pytest.CaptureFixture[str]) -> None:
    for ask in (["--help"], ["bench", "--help"]):
        assert ended(*ask) == 0
        said = capsys.readouterr().out
        assert all(name in said for name in BENCHMARKS)


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["lab", "--out", "x", "--stepz", "3"], "--stepz"),
        (["lab", "--out", "x", "--steps", "three"], "invalid literal"),
        (["attack", "x.pcapng", "--out", "y"], "--model"),
        (["nonsense"], "nonsense"),
        ([], "Expected one of"),
        (["bench"], "exchange"),
        (["bench", "nonsense"], "nonsense"),
        (["inspect", "x.pcapng", "--", "ls"], "inspect takes no command after --"),
        (["lab", "--out", "x", "--steps", "0"], "steps: wanted 1 or more, got 0"),
        (["lab", "--out", "x", "--exchange", "mpi"], "zeromq, allreduce, ddp"),
    ],
)
def test_wrong_use_is_one_line_and_ends_2(argv: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert ended(*argv) == 2
    assert says in complaint(capsys)


@pytest.mark.parametrize("command", ["inspect", "decode", "attack"])
@pytest.mark.parametrize(
    "content", [None, b"", b"not a capture at all, but a text that is long enough", b"\x89PNG\r\n\x1a\n" * 9]
)
def test_a_file_that_is_no_capture_is_one_line_and_ends_1(
    command: str, content: bytes | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "wire.pcapng"
    if content is not None:
        file.write_bytes(content)
    more = {"inspect": [], "decode": ["--out", "o.safetensors"], "attack": ["--model", "lenet", "--out", "o"]}[command]
    more = [str(tmp_path / option) if option.startswith("o") else option for option in more]
    assert ended(command, str(file), *more) == 1
    assert "wire.pcapng" in complaint(capsys)


def test_an_unknown_model_lists_those_that_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert ended("attack", "x.pcapng", "--model", "alexnet", "--out", str(tmp_path)) == 2
    assert "lenet, mlp, convnet, resnet" in complaint(capsys)


def test_evaluating_what_was_not_attacked_says_what_to_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert ended("evaluate", str(tmp_path)) == 1
    assert "gradtap attack" in complaint(capsys)


def test_a_run_folder_with_something_in_it_is_not_overwritten(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    assert ended("lab", "--out", str(tmp_path)) == 2
    assert "is not empty" in complaint(capsys)
    assert ended("lab", "--out", str(tmp_path), "--overwrite") == 2
    assert "is not a run" in complaint(capsys)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_json_is_one_object_and_nothing_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "wire.pcapng"
    with file.open("wb") as out, PcapngWriter(out, interfaces=[("lo", LINK_ETHERNET)]):
        pass
    assert ended("inspect", str(file), "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert {"flows", "protocols", "encrypted", "world_size", "steps", "parameters", "gaps"} <= set(found)
