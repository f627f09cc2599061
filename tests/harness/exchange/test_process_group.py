"""The exchanges over torch.distributed leave nothing behind."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

ALONE = """
import sys
from pathlib import Path
import torch
from torch import nn
from harness.exchange import connect

exchange = connect(sys.argv[1], device=torch.device("cpu"))
exchange.start(nn.Linear(3, 2), step=0)
exchange.average(torch.ones(8), step=0)
threads = lambda: [file.read_text().strip() for file in Path("/proc/self/task").glob("*/comm")]
assert any("gloo" in name for name in threads()), threads()
exchange.close()
assert not any("gloo" in name for name in threads()), threads()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="threads are counted in /proc")
@pytest.mark.parametrize("exchange", ["allreduce", "ddp"])
def test_no_thread_of_gloo_outlives_the_exchange(exchange: str) -> None:
    # One that does can abort the process at its exit. In a process of its own: what was imported before matters.
    env = os.environ | {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "0",
        "RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_RANK": "0",
    }
    done = subprocess.run([sys.executable, "-c", ALONE, exchange], env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr[-1000:]
