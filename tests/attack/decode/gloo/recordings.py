"""Real Gloo traffic with the truth beside it: recorded in a lab, kept small, and how.

    GRADTAP_WRITE_VECTORS=1 python -m pytest tests/attack/decode/gloo/test_recordings.py

records the vectors again. They were made with torch 2.13.0 on Linux. Ports and times differ each time.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from attack.capture.streams import StreamEvent
from attack.decode.recording import Desk
from attack.observation import Known, Observation
from nodes.commands.lab import environment
from nodes.lab import LabConfig, run_lab
from nodes.node import Node

FOLDER = Path(__file__).parents[3] / "vectors" / "gloo"

ONLY_IPV6 = """
import os, socket, sys
from pyroute2 import IPRoute
with IPRoute() as network:
    network.addr("del", index=socket.if_nametoindex("lo"), address="127.0.0.1", prefixlen=8)
os.execv(sys.argv[1], sys.argv[1:])
"""
"""Takes IPv4 from the private network that it runs in, and becomes the command that follows."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One recorded job."""

    world: int
    options: tuple[str, ...] = ()
    env: tuple[tuple[str, str], ...] = ()

    @property
    def name(self) -> str:
        return "-".join([f"ddp{self.world}", *self.options, *("old-store" for _ in self.env)])


CASES = (
    Case(world=2),
    Case(world=3, options=("norm",)),
    Case(world=2, options=("unused",)),
    Case(world=2, options=("static",)),
    Case(world=2, options=("half",)),
    Case(world=2, options=("standalone",), env=(("USE_LIBUV", "0"),)),
)


LARGER = Case(world=4)


def record_many(
    jobs: list[dict[str, Any]], run: Path, *, world: int, ipv6: bool = False, launcher: bool = False
) -> Path:
    """Runs the script with many models in a lab, under torchrun or by itself. Returns its run folder."""
    run.mkdir(parents=True)
    python, address = sys.executable, "::1" if ipv6 else "127.0.0.1"
    torchrun = (
        *("-m", "torch.distributed.run", "--nproc-per-node", str(world)),
        *("--master-addr", address, "--master-port", "29500"),
    )
    script = str(Path(__file__).with_name("many.py"))
    argv = (python, *(torchrun if launcher else ()), script, str(run / "truth"), str(world), json.dumps(jobs))
    env = environment(hosts=False) | {"PYTHONPATH": str(Path(__file__).parents[4]), "MASTER_ADDR": address}
    if ipv6:
        argv = (python, "-c", ONLY_IPV6, *argv)
    return run_alone(Node(name="command", argv=argv, env=env), run)


def record(case: Case, run: Path) -> Path:
    """Runs the stock script in a lab and returns its run folder."""
    run.mkdir(parents=True, exist_ok=True)
    script = Path(__file__).with_name("stock.py")
    launcher = ("-m", "torch.distributed.run", "--nproc-per-node", str(case.world))
    if "standalone" in case.options:
        launcher = (*launcher, "--standalone")
    env = environment(hosts=False) | dict(case.env)
    argv = (sys.executable, *launcher, str(script), str(run / "truth"), *case.options)
    if "ipv6" in case.options:
        env |= {"GLOO_SOCKET_IFNAME": "lo"}
        argv = (sys.executable, "-c", ONLY_IPV6, *argv[:3], "--master-addr", "::1", *argv[3:])
    if "lazy" in case.options:
        env |= {"TORCH_GLOO_LAZY_INIT": "1"}
    return run_alone(Node(name="command", argv=argv, env=env), run)


def run_alone(node: Node, run: Path) -> Path:
    """Runs one node in a lab. Returns the run folder."""
    result = run_lab(LabConfig(nodes=(node,), run=run, ring_mib=256, deadline_s=600.0, echo=False))
    assert result.ok, (result.message, result.log_tail)
    assert result.dropped == 0, result.message
    return run


def read_truth(folder: Path) -> dict[str, np.ndarray]:
    """All that the ranks left, as `step{S}.rank{R}.gradient` and `.weights`."""
    return {
        f"{file.stem}.{name}": array for file in sorted(folder.glob("*.npz")) for name, array in np.load(file).items()
    }


def name_of(seen: Observation) -> str:
    """What its truth is called."""
    return f"{'' if seen.group is None else f'group{seen.group}.'}step{seen.step}.rank{seen.rank}"


def check(truth: dict[str, np.ndarray], observations: list[Observation]) -> None:
    """Fails where anything is said to be known, and is not so."""
    for seen in observations:
        where = name_of(seen)
        assert f"{where}.gradient" in truth or not seen.known.any(), f"{where}: there was no such gradient"
        if f"{where}.gradient" not in truth:
            continue
        true, got, known = truth[f"{where}.gradient"], seen.gradient.numpy(), seen.known.numpy()
        raw, differenced = known == Known.RAW, known == Known.DIFFERENCED
        assert got.dtype == true.dtype or not raw.any(), f"{where}: of another type"
        bits = f"u{got.itemsize}"
        assert (got[raw].view(bits) == true[raw].view(bits)).all(), f"{where}: a RAW element is wrong"
        if differenced.any():
            assert seen.bound is not None
            error = np.abs(got[differenced].astype(np.longdouble) - true[differenced])
            assert (error <= seen.bound.numpy()[differenced]).all(), f"{where}: beyond its bound"
        if seen.weights is not None:
            weights = truth[f"{where}.weights"]
            assert weights.dtype == seen.weights.numpy().dtype, f"{where}: weights of another type"
            assert (seen.weights.numpy().view(bits) == weights.view(bits)).all(), f"{where}: wrong weights"


def observe(events: list[StreamEvent]) -> tuple[list[Observation], Desk]:
    """What a desk proves of these streams."""
    desk = Desk(events, optimizer="sgd:lr=0.1")
    return list(desk.observations()), desk
