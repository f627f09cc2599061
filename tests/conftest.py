"""Tests that need more than Python say so by a marker, and are skipped, with the reason, where it cannot be had."""

from __future__ import annotations

import signal

import pytest

from nodes.errors import NetworkError
from nodes.lab import private_network
from tests.helpers import missing


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("lab") is not None:
        try:
            private_network()
        except NetworkError as error:
            missing("lab", str(error))


def pytest_sessionstart() -> None:
    # Whoever runs the tests in the background of a script has SIGINT ignored, and so would all that the tests start.
    signal.signal(signal.SIGINT, signal.default_int_handler)
