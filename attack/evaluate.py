"""Opens the truth beside an attack's answer, and adds what only the truth can say.

In: a run folder with `attack/` (the answer, already written) and `truth/`. Out: `attack/evaluation.json`. This is the
only place on the eavesdropper's side that opens the truth, and it gives nothing back to an attack.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
from pathlib import Path
from typing import Any

from torch import Tensor

from attack.answer import ANSWER, TENSORS, read_json, read_tensors, to_plain, victim_name
from attack.errors import AnswerError
from attack.files import write_atomically
from attack.metrics import score
from attack.shades import Shades
from attack.truth import FOLDER, read_truth

EVALUATION = "evaluation.json"
KEPT = (
    "rank", "step", "status", "method", "route", "reason", "seconds", "cpu_seconds", "gradient_residual",
    "predicted_mse",
)  # fmt: skip
"""What a victim's entry of `attack.json` keeps in `evaluation.json`."""
GOOD_PSNR_DB = 40.0
"""From here on a picture counts as read back; its error is at most 1 % of the range, root mean square."""


def evaluate(run: Path, *, truth: Path | None = None) -> dict[str, Any]:
    """Scores the attack of a run against its truth, and writes `RUN/attack/evaluation.json`.

    Args:
        run: run folder, with `attack/` in it.
        truth: folder with the truth, as `attack.truth` reads it; None: the run's own.

    Returns: what the file holds: `victims[]`, `counts` and `medians`. Metrics of a victim without an answer are None.

    Raises: AnswerError: a file is missing or damaged; names it, and what to run first.
    """
    folder = run / "attack"
    redo = f"run first: gradtap attack CAPTURE --out {folder}"
    answer = read_json(folder / ANSWER, hint=redo)
    tensors = read_tensors(folder / TENSORS, hint=redo)
    try:
        shades = Shades.of(answer["knowledge"])
        victims = [_victim(entry, tensors, truth or run / FOLDER, shades) for entry in answer["victims"]]
    except (KeyError, TypeError) as error:
        raise AnswerError(f"{folder / ANSWER}: {error!r} is not as an attack writes it; {redo}") from error
    evaluation: dict[str, Any] = to_plain(
        {
            "data_range": "the truth's own" if shades is None else [shades.black.tolist(), shades.white.tolist()],
            "ssim_settings": "Wang et al. 2004: Gaussian window 11 x 11, sigma 1.5; mean over channels",
            "victims": victims,
            **_summary(victims),
        }
    )
    write_atomically(folder / EVALUATION, json.dumps(evaluation, indent=1, allow_nan=False))
    return evaluation


def _victim(
    entry: dict[str, Any], tensors: dict[str, Tensor], truth_folder: Path, shades: Shades | None
) -> dict[str, Any]:
    name = victim_name(entry["rank"], entry["step"])
    kept = {key: entry.get(key) for key in KEPT}
    if f"{name}.inputs" not in tensors:
        return kept | {"psnr_db": None, "mse": None, "ssim": None, "label_ok": None, "examples": None}
    inputs, labels = read_truth(
        truth_folder, rank=entry["rank"], step=entry["step"], ranks=entry["observation"].get("ranks", ())
    )
    try:
        known = shades or Shades.own(inputs)
        found = score(
            tensors[f"{name}.inputs"],
            tensors[f"{name}.labels"],
            inputs,
            labels,
            input_range=(known.black, known.white),
        )
    except ValueError as error:
        raise AnswerError(f"{truth_folder / name}: {error}; is it the truth of this capture?") from error
    return kept | {
        "psnr_db": found.psnr_db,
        "mse": found.mse,
        "ssim": found.ssim,
        "label_ok": found.label_ok,
        "examples": [dataclasses.asdict(example) for example in found.examples],
    }


def _summary(victims: list[dict[str, Any]]) -> dict[str, Any]:
    statuses = [victim["status"] for victim in victims]
    scored = [victim for victim in victims if victim["psnr_db"] is not None]
    return {
        "counts": {
            "victims": len(victims),
            **{status: statuses.count(status) for status in ("converged", "filled", "not_converged", "not_observed")},
            "read_back": sum(victim["psnr_db"] >= GOOD_PSNR_DB and victim["label_ok"] for victim in scored),
        },
        "read_back_means": f"PSNR at least {GOOD_PSNR_DB:g} dB and every label right",
        "medians": {
            key: statistics.median(values) if (values := [v[key] for v in scored if v[key] is not None]) else None
            for key in ("psnr_db", "mse", "ssim", "seconds", "cpu_seconds", "gradient_residual", "predicted_mse")
        },
    }
