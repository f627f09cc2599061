"""What tests of several rooms share."""

from __future__ import annotations

import os
from typing import NoReturn

import pytest


def missing(requirement: str, reason: str) -> NoReturn:
    """Skips the test and says why; fails it where GRADTAP_REQUIRE (names, with commas between) has the requirement."""
    if requirement in os.environ.get("GRADTAP_REQUIRE", "").split(","):
        pytest.fail(f"GRADTAP_REQUIRE wants {requirement}, but {reason}")
    pytest.skip(reason)
