"""A lab leaves nothing behind, whatever a test does to it."""

from __future__ import annotations

import socket
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.nodes.labs import TOKEN, living, until


@pytest.fixture
def token(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Marks the processes of a test. At its end there are none, and interfaces and mounts are as they were."""
    interfaces, mounts = socket.if_nameindex(), Path("/proc/self/mounts").read_text()
    name = uuid.uuid4().hex
    monkeypatch.setenv(TOKEN, name)
    yield name
    until(lambda: not living(name))
    assert socket.if_nameindex() == interfaces
    assert Path("/proc/self/mounts").read_text() == mounts
