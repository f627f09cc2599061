"""The lab needs no root: an ordinary user's own user namespace has all the rights that it takes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from nodes.node import PROJECT
from tests.helpers import missing
from tests.nodes.labs import living, until

pytestmark = pytest.mark.lab

NOBODY = 65_534
"""The user that every Linux system has and that owns nothing."""

AS_NOBODY = ("setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", "env")
"""With `env` in between, because setpriv itself still starts a program with root's rights to find it."""

LAB = """
import json, os
from pathlib import Path
from nodes.lab import run_lab
from tests.nodes.labs import LISTEN, TALK, script, small_lab
assert os.geteuid() != 0
listen = script("listen", LISTEN, "10.77.0.1", 7000, 1, 1000, host="rank0")
talk = script("talk", TALK, "10.77.0.1", 7000, "x", 1000, host="rank1")
print(json.dumps(run_lab(small_lab(Path("run"), listen, talk, hosts=("rank0", "rank1"))).to_json()))
"""


@pytest.fixture
def place() -> Iterator[Path]:
    """A folder that is nobody's, with a copy of what a lab needs: root's own folders may be closed to others."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        for package in ("nodes", "attack", "harness", "tests"):
            shutil.copytree(PROJECT / package, place / package, ignore=shutil.ignore_patterns("__pycache__"))
        for package in ("pyroute2", "dpkt"):
            spec = find_spec(package)
            assert spec is not None and spec.origin is not None
            shutil.copytree(Path(spec.origin).parent, place / package)
        for path in (place, *place.rglob("*")):
            os.chown(path, NOBODY, NOBODY)
        yield place


@pytest.mark.skipif(os.geteuid() != 0, reason="this is an ordinary user: the other tests of the lab say as much")
def test_lab_with_hosts_runs_as_an_ordinary_user(place: Path, token: str) -> None:
    argv = [*AS_NOBODY, readable_python(place), "-c", LAB]
    ran = subprocess.run(argv, cwd=place, capture_output=True, text=True, timeout=60, check=False)
    assert ran.returncode == 0, ran.stderr
    result = json.loads(ran.stdout)
    assert result["ok"], result
    assert result["exit_codes"] == {"listen": 0, "talk": 0}
    assert result["packets"] > 0 and result["dropped"] == 0
    assert (place / "run/wire.pcapng").stat().st_uid == NOBODY
    until(lambda: not living(token))


def readable_python(place: Path) -> str:
    """An interpreter that nobody may run, of a version that will do. Skips where there is none."""
    for python in (sys.executable, "/usr/bin/python3", "/usr/local/bin/python3"):
        check = "import sys; sys.exit(sys.version_info < (3, 11))"
        ran = subprocess.run([*AS_NOBODY, python, "-c", check], cwd=place, capture_output=True, check=False)
        if ran.returncode == 0:
            return python
    missing("ordinary-user", "no Python of 3.11 or later here that an ordinary user may run")
