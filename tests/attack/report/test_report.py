"""The report is one file: complete, escaped, and silent towards any network."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import safetensors.torch
import torch

from attack.algorithms import METHODS
from attack.errors import AnswerError
from attack.evaluate import evaluate
from attack.observation import Knowledge
from attack.report import Chapter, write_report
from attack.report.chapter import METHOD_NAMES
from attack.report.page import number
from attack.report.plot import plot
from attack.victims import Plan, attack_all
from harness.models import load_model
from tests.attack.toys import observe
from tests.helpers import missing

SPEC = "lenet:input=3x12x12,classes=10,channels=6"
EVIL = "<script>alert(1)</script><img src=http://example.org/x.png>"
CHROMIUM_S = 60


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report of two recordings, one of them with a failed victim and hostile names."""
    run = tmp_path_factory.mktemp("run")
    (run / "truth").mkdir()
    seen = []
    for rank in range(2):
        torch.manual_seed(rank)
        model, inputs, labels = load_model(SPEC), torch.rand(1, 3, 12, 12), torch.tensor([rank + 3])
        seen.append(observe(model, inputs, labels, rank=rank, defense=EVIL))
        safetensors.torch.save_file(
            {"inputs": inputs, "labels": labels}, run / "truth" / f"step0.rank{rank}.safetensors"
        )
    seen.append(dataclasses.replace(seen[0], step=1, weights=None))
    attack_all(seen, Knowledge(model=SPEC, input_shape=(3, 12, 12)), run / "attack", plan=Plan(processes=1))
    assert evaluate(run)["counts"]["read_back"] == 2
    (run / "lab.json").write_text(json.dumps({"packets": 1234, "bytes": 56789, "dropped": 0}))
    (run / "config.json").write_text(json.dumps({"command": ["gradtap", EVIL], "versions": {"torch": "2"}}))
    inspect = {"protocols": [EVIL], "gaps": [{"flow": EVIL, "length": 7}], "flows": [], "encrypted": False}
    chapters = [Chapter(title="Over ZeroMQ", run=run, inspect=inspect), Chapter(title=EVIL, run=run)]
    return write_report(chapters, tmp_path_factory.mktemp("report"))


def test_everything_from_files_is_escaped(page: Path) -> None:
    text = page.read_text()
    assert "<script" not in text and "<img src=http" not in text
    assert text.count("&lt;script&gt;") >= 5


def test_nothing_refers_to_a_network(page: Path) -> None:
    text = page.read_text()
    for reference in re.findall(r"""(?:src|href|srcset|action|data|poster)=["']([^"']*)""", text):
        assert reference.startswith(("data:", "#")), reference
    assert "url(" not in text and "@import" not in text
    assert "default-src 'none'" in text


def test_it_tells_the_story_and_names_every_failure(page: Path) -> None:
    text = page.read_text()
    assert "4 of 6 private batches were read back" in text
    assert "the weights at this step were not seen" in text
    assert "1,234" in text and "What the eavesdropper was told" in text
    assert text.count('alt="Original') == text.count('alt="Picture read back') == text.count('alt="Animation') == 4


def test_missing_evaluation_says_what_to_run(tmp_path: Path) -> None:
    with pytest.raises(AnswerError, match=r"evaluation\.json: no such file; run first: gradtap evaluate"):
        write_report([Chapter(title="x", run=tmp_path)], tmp_path)


def test_numbers_are_for_people() -> None:
    assert [number(value) for value in (None, 0.0, 96.234, 3.1e-7)] == ["–", "0.00", "96.23", "3.1\xa0×\xa010⁻⁷"]


def test_plot_needs_two_points_above_zero() -> None:
    assert plot([]) is None and plot([(0, 1.0), (1, None), (2, 0.0)]) is None
    drawn = plot([(0, 1.0), (5, 1e-6)])
    assert drawn is not None and drawn.end == "5" and drawn.ticks[0][1] == "1e-6"
    assert plot([(0, 1.0), (0, 1.0)]) is not None


@pytest.mark.browser
def test_browser_shows_it_without_a_request_or_an_error(page: Path, tmp_path: Path) -> None:
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        missing("browser", "there is no chromium on the path")
    # The page itself allows no script: a copy that allows one reports on its own pictures.
    check = """<script>onload = () => {
      const pictures = [...document.images];
      document.title = pictures.every(picture => picture.complete && picture.naturalWidth == 12) + ' '
        + pictures.length + ' '
        + performance.getEntriesByType('resource').filter(entry => !entry.name.startsWith('data:')).length + ' '
        + (document.documentElement.scrollWidth <= innerWidth);
    }</script></body>"""
    copy = tmp_path / "copy.html"
    copy.write_text(
        page.read_text().replace("style-src", "script-src 'unsafe-inline'; style-src").replace("</body>", check)
    )
    outcome = subprocess.run(
        [
            browser, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
            "--disable-component-update", "--disable-sync", "--enable-logging=stderr", "--window-size=400,900",
            f"--user-data-dir={tmp_path}/profile", "--dump-dom", copy.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=CHROMIUM_S,
    )  # fmt: skip
    assert outcome.returncode == 0, outcome.stderr
    assert "<title>true 12 0 true</title>" in outcome.stdout, re.findall("<title>.*?</title>", outcome.stdout)
    assert "CONSOLE" not in outcome.stderr, outcome.stderr


def test_every_method_has_a_name() -> None:
    assert METHOD_NAMES.keys() == METHODS.keys()
