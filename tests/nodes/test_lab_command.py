"""`gradtap lab` and `gradtap record`: what the options become, and what is refused."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from harness.config import TrainConfig
from harness.errors import ConfigError
from nodes import cli
from nodes.commands.lab import Lab, new_run_folder, resolve
from nodes.torchrun import TORCHRUN


def test_own_job_is_workers_and_servers(tmp_path: Path) -> None:
    config = Lab(out=tmp_path, num_workers=3, num_servers=2).config()
    workers, *servers = config.nodes
    assert workers.argv[-2:] == ("--servers", "tcp://127.0.0.1:5555,tcp://127.0.0.1:5556")
    assert [server.name for server in servers] == ["server0", "server1"]
    assert all(server.service and "3" in server.argv for server in servers)
    assert config.hosts == ()


def test_own_job_without_zeromq_has_no_servers(tmp_path: Path) -> None:
    (workers,) = Lab(out=tmp_path, train=TrainConfig(exchange="ddp")).config().nodes
    assert "--servers" not in workers.argv


def test_relay_stands_between_workers_and_servers(tmp_path: Path) -> None:
    config = Lab(out=tmp_path, num_servers=2, relay=True).config()
    here, there = zip(*(route.split("=") for route in config.relay), strict=True)
    workers, *servers = config.nodes
    assert workers.argv[-1] == ",".join(f"tcp://{endpoint}" for endpoint in here)
    assert [server.argv[server.argv.index("--bind") + 1] for server in servers] == [f"tcp://{end}" for end in there]
    with pytest.raises(ConfigError, match="--relay is for the own job"):
        Lab(out=tmp_path, relay=True, train=TrainConfig(exchange="ddp")).config()


def test_hosts_are_numbered_by_rank_and_servers_come_last(tmp_path: Path) -> None:
    config = Lab(out=tmp_path, num_workers=2, hosts=True, tap="rank:1").config()
    assert config.hosts == ("rank0", "rank1", "servers")
    assert config.tap == "rank1"
    assert config.nodes[1].argv[-4:] == ("--servers", "tcp://10.77.0.3:5555", "--host", "10.77.0.2")
    assert config.nodes[0].env["GLOO_SOCKET_IFNAME"] == "eth0"


def test_command_is_started_as_it_is_or_once_a_host(tmp_path: Path) -> None:
    command = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "train.py")
    (node,) = Lab(out=tmp_path, command=command).config().nodes
    assert node.argv == command
    nodes = Lab(out=tmp_path, command=command, hosts=True).config().nodes
    assert [node.host for node in nodes] == ["rank0", "rank1"]


def test_programs_are_found_without_a_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert resolve(("torchrun", "train.py")) == (*TORCHRUN, "train.py")
    assert resolve(("python", "train.py")) == (sys.executable, "train.py")
    with pytest.raises(ConfigError, match="no-such: no such program"):
        resolve(("no-such",))


def test_only_a_run_is_replaced_and_only_if_asked(tmp_path: Path) -> None:
    new_run_folder(tmp_path / "new", overwrite=False)
    (tmp_path / "run").mkdir()
    (tmp_path / "run/lab.json").touch()
    with pytest.raises(ConfigError, match="is not empty"):
        new_run_folder(tmp_path / "run", overwrite=False)
    new_run_folder(tmp_path / "run", overwrite=True)
    assert list((tmp_path / "run").iterdir()) == []
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(ConfigError, match="is not a run"):
        new_run_folder(tmp_path, overwrite=True)
    with pytest.raises(ConfigError, match="got a file"):
        new_run_folder(tmp_path / "thesis.tex", overwrite=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["record", "--interface", "lo", "--out", "{tmp}/a"], "add --on-this-host"),
        (["record", "--interface", "lo", "--out", "{tmp}", "--on-this-host"], "is there already"),
        (["lab", "--out", "{tmp}/a", "--tap", "rank:1"], "tap: wanted one of all, got rank1"),
        (["lab", "--out", "{tmp}/a", "--steps", "9", "--", "torchrun", "train.py"], "have no effect"),
        (["lab", "--out", "{tmp}/a", "--hosts", "--", "true"], "wanted a torchrun command"),
        (["lab", "--out", "{tmp}/a", "--num-workers", "0"], "wanted 1 worker or more"),
    ],
)
def test_wrong_use_is_one_line_and_code_2(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert cli.main([argument.format(tmp=tmp_path) for argument in arguments]) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert message in err and err.count("\n") == 1
    assert list(tmp_path.iterdir()) == [], "a refused run leaves no folder"


@pytest.mark.lab
def test_json_is_alone_on_standard_output(tmp_path: Path, capfd: pytest.CaptureFixture[str], token: str) -> None:
    assert cli.main(["lab", "--out", str(tmp_path / "run"), "--json", "--ring-mib", "16", "--", "echo", "hello"]) == 0
    out, err = capfd.readouterr()
    result = json.loads(out)
    assert result["exit_codes"] == {"command": 0} and result["dropped"] == 0
    assert Path(result["capture"]).exists()
    assert "[command] hello" in err
    assert cli.main(["lab", "--out", str(tmp_path / "bad"), "--tap", "none", "--", "sh", "-c", "exit 3"]) == 1
    assert capfd.readouterr().out.startswith("command: exit code 3 after")
