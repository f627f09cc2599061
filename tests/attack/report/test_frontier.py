"""The page of a sweep: whole, escaped, silent towards any network, and honest about what was not read."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from attack.frontier.summary import summarize
from attack.report.frontier import write_frontier
from attack.report.pictures import still
from attack.shades import Shades
from tests.attack.frontier.test_summary import leak, training, victim

EVIL = "<script>alert(1)</script>"


def test_the_page_shows_what_came_back_and_what_did_not(tmp_path: Path) -> None:
    shot = still(torch.rand(3, 8, 8), Shades.between(0.0, 1.0))
    shown = {"original": shot, "naive": None, "naive_psnr_db": None, "adaptive": shot, "adaptive_psnr_db": 30.0}
    cells = [
        {**leak("initial", victim("naive", None), victim("adaptive", 2e-4)), "pictures": [shown]},
        training(0.9, seed=0),
        {"defense": EVIL, "stage": "training", "seed": 0, "failed": EVIL},
    ]
    made = {"cells": 3, "cells_wanted": 6, "cpu_seconds": 90.0, "question": {"model": EVIL}, "versions": {"torch": "2"}}
    page = write_frontier(summarize(cells), cells, made, tmp_path)
    text = page.read_text()
    assert text.count("no answer") == 1 and text.count('alt="What the adaptive') == 1 and "30.0 dB" in text
    assert "3 of 6 cells are done" in text and "<script" not in text and text.count("&lt;script&gt;") >= 3
    references = re.findall(r"""(?:src|href)=["']([^"']*)""", text)
    assert references and all(reference.startswith(("data:", "#")) for reference in references)
    assert b"<svg" in (tmp_path / "leak-accuracy.svg").read_bytes() and (tmp_path / "leak-bytes.svg").exists()
