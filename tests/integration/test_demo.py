"""The demo, as a newcomer runs it: private pictures come back out of the traffic of both exchanges."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nodes.commands.demo import EXCHANGES, Demo

pytestmark = pytest.mark.lab


def test_pictures_come_back_from_both_exchanges(tmp_path: Path) -> None:
    done = Demo(out=tmp_path, steps=1, seed=3).run()
    assert done.ok and [found["exchange"] for found in done.json["recordings"]] == list(EXCHANGES)
    for found in done.json["recordings"]:
        assert [(victim["step"], victim["rank"]) for victim in found["victims"]] == [(0, 0), (0, 1)]
        assert all(victim["psnr_db"] >= 40 and victim["label_ok"] for victim in found["victims"])
    report = Path(done.json["report"]).read_text()
    assert report.count("data:image/png;base64,") >= 8  # an original and a reconstruction of each victim
    assert "http://" not in report.replace("http://www.w3.org/", "") and "https://" not in report
    json.dumps(done.json, allow_nan=False)
