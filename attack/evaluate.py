"""Opens the truth beside an attack's answer, and adds what only the truth can say.

In: a run folder with `attack/` (the answer, already written) and `truth/`. Out: `attack/evaluation.json`. This is the
only place on the eavesdropper's side that opens the truth, and it gives nothing back to an attack.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from attack.answer import ANSWER, TENSORS, read_json, read_tensors, to_plain, victim_name
from attack.errors import AnswerError
from attack.files import write_atomically
from attack.metrics import Score, score
from attack.shades import Shades
from attack.text_metrics import ROUGE, score_text
from attack.truth import FOLDER, read_truth
from harness.models import Tokens, load_tokenizer

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
        judge = judge_of(answer["knowledge"])
        victims = [_victim(entry, tensors, truth or run / FOLDER, judge) for entry in answer["victims"]]
    except (KeyError, TypeError) as error:
        raise AnswerError(f"{folder / ANSWER}: {error!r} is not as an attack writes it; {redo}") from error
    evaluation: dict[str, Any] = to_plain({**judge.settings, "victims": victims, **_summary(victims, judge)})
    write_atomically(folder / EVALUATION, json.dumps(evaluation, indent=1, allow_nan=False))
    return evaluation


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Judge:
    """What an answer is measured by."""

    metrics: tuple[str, ...]
    """Of a victim; the first is there where any is."""
    score: Callable[[Tensor, Tensor, Tensor, Tensor], Any]
    """Inputs and labels of an answer, then of the truth -> a value with `metrics` and `examples`."""
    good: Callable[[dict[str, Any]], bool]
    """Whether a victim with metrics counts as read back."""
    settings: dict[str, Any]
    """What the file says of how it was measured."""
    tokens: Tokens | None = None
    """Where the inputs are tokens."""


def judge_of(knowledge: dict[str, Any]) -> Judge:
    """Raises: KeyError, TypeError: this is not as an attack writes it. AnswerError: its tokenizer is missing."""
    if knowledge.get("tokens") is not None:
        tokens, name = Tokens(**knowledge["tokens"]), knowledge.get("tokenizer")
        try:
            reader = None if name is None else load_tokenizer(name)
        except ValueError as error:
            raise AnswerError(str(error)) from error
        return Judge(
            metrics=("token_accuracy", "exact", "sentences", *ROUGE, "label_ok"),
            score=partial(score_text, tokens=tokens, reader=reader),
            good=lambda victim: bool(victim["exact"] == victim["sentences"] and victim["label_ok"]),
            settings={
                "rouge_settings": "rouge-score, F1, no stemming; without a tokenizer of tokens in place of words",
                "read_back_means": "every sentence exact, token for token, and every label right",
            },
            tokens=tokens,
        )
    shades = Shades.of(knowledge)
    return Judge(
        metrics=("psnr_db", "mse", "ssim", "label_ok"),
        score=partial(_score_pictures, shades),
        good=lambda victim: bool(victim["psnr_db"] >= GOOD_PSNR_DB and victim["label_ok"]),
        settings={
            "data_range": "the truth's own" if shades is None else [shades.black.tolist(), shades.white.tolist()],
            "ssim_settings": "Wang et al. 2004: Gaussian window 11 x 11, sigma 1.5; mean over channels",
            "read_back_means": f"PSNR at least {GOOD_PSNR_DB:g} dB and every label right",
        },
    )


def _score_pictures(
    shades: Shades | None, inputs: Tensor, labels: Tensor, true_inputs: Tensor, true_labels: Tensor
) -> Score:
    known = shades or Shades.own(true_inputs)
    return score(inputs, labels, true_inputs, true_labels, input_range=(known.black, known.white))


def _victim(entry: dict[str, Any], tensors: dict[str, Tensor], truth_folder: Path, judge: Judge) -> dict[str, Any]:
    name = victim_name(entry["rank"], entry["step"])
    kept = {key: entry.get(key) for key in KEPT}
    if f"{name}.inputs" not in tensors:
        return kept | dict.fromkeys((*judge.metrics, "examples"))
    inputs, labels = read_truth(
        truth_folder,
        rank=entry["rank"],
        step=entry["step"],
        ranks=entry["observation"].get("ranks", ()),
        tokens=judge.tokens,
    )
    try:
        found = judge.score(tensors[f"{name}.inputs"], tensors[f"{name}.labels"], inputs, labels)
    except ValueError as error:
        raise AnswerError(f"{truth_folder / name}: {error}; is it the truth of this capture?") from error
    return kept | {
        **{metric: getattr(found, metric) for metric in judge.metrics},
        "examples": [dataclasses.asdict(example) for example in found.examples],
    }


def _summary(victims: list[dict[str, Any]], judge: Judge) -> dict[str, Any]:
    statuses = [victim["status"] for victim in victims]
    scored = [victim for victim in victims if victim[judge.metrics[0]] is not None]
    numbers = [name for name in judge.metrics if name != "label_ok"]
    return {
        "counts": {
            "victims": len(victims),
            **{status: statuses.count(status) for status in ("converged", "filled", "not_converged", "not_observed")},
            "read_back": sum(judge.good(victim) for victim in scored),
        },
        "medians": {
            key: statistics.median(values) if (values := [v[key] for v in scored if v[key] is not None]) else None
            for key in (*numbers, "seconds", "cpu_seconds", "gradient_residual", "predicted_mse")
        },
    }
