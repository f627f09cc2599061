"""Rows of a sweep: nothing that was not read counts as read, and what was not measured is not a number."""

from __future__ import annotations

from typing import Any

import pytest

from attack.frontier.summary import summarize, wilson


def victim(attacker: str, mse: float | None, label_ok: bool = True) -> dict[str, Any]:
    scores = {"psnr_db": None, "ssim": None} if mse is None else {"psnr_db": 30.0, "ssim": 0.9}
    return {"attacker": attacker, "mse": mse, "label_ok": label_ok and mse is not None, "cpu_seconds": 1.0, **scores}


def leak(stage: str, *victims: dict[str, Any], defense: str = "int8", seed: int = 0) -> dict[str, Any]:
    return {"defense": defense, "stage": stage, "seed": seed, "victims": list(victims)}


def training(accuracy: float, *, seed: int) -> dict[str, Any]:
    measured = {"bytes_per_step": 110.0, "plain_bytes": 400, "step_ms": 5.0, "defense_ms": 1.0}
    return {"defense": "int8", "stage": "training", "seed": seed, "accuracy": accuracy, **measured}


def test_a_picture_that_was_not_given_is_not_read():
    seen = [victim("adaptive", 2e-4), victim("adaptive", None), victim("adaptive", 2e-2), victim("naive", 0.5)]
    (row,) = summarize([leak("initial", *seen[:2]), leak("initial", *seen[2:], seed=1)])
    assert (row["initial_adaptive_pictures"], row["initial_adaptive_answers"]) == (3, 2)
    assert row["initial_adaptive_below_1e-3"] == row["initial_adaptive_below_1e-2"] == pytest.approx(1 / 3)
    assert row["initial_adaptive_below_1e-4"] == row["initial_naive_below_1e-2"] == 0
    assert row["initial_adaptive_label_accuracy"] == pytest.approx(2 / 3)
    assert row["trained_naive_pictures"] == 0 and row["trained_naive_below_1e-3"] is None and row["accuracy"] is None


def sentence(attacker: str, right: float) -> dict[str, Any]:
    return {"attacker": attacker, "exact": right == 1, "token_accuracy": right, "rougeL": right, "cpu_seconds": 1.0}


def test_a_sentence_that_was_not_given_has_no_token_right():
    seen = [sentence("adaptive", 1.0), sentence("adaptive", 0.0), sentence("naive", 0.5)]
    (row,) = summarize([leak("text", *seen[:1]), leak("text", *seen[1:], seed=1)])
    assert (row["text_adaptive_sentences"], row["text_adaptive_exact"]) == (2, 0.5)
    assert (row["text_adaptive_token_accuracy"], row["text_naive_rougeL"], row["text_naive_exact"]) == (0.5, 0.5, 0)
    assert row["initial_adaptive_pictures"] == 0 and row["text_adaptive_exact_low"] < 0.5


def test_means_over_seeds_have_an_interval_and_one_seed_has_none():
    (row,) = summarize([training(0.9, seed=0)])
    assert (row["accuracy"], row["accuracy_low"], row["accuracy_high"]) == (0.9, None, None)
    (row,) = summarize([training(value, seed=seed) for seed, value in enumerate((0.88, 0.90, 0.92))])
    # Student's t with two degrees of freedom: 4.303 standard errors, of 0.02 / sqrt(3).
    assert row["accuracy_high"] - row["accuracy"] == pytest.approx(4.303 * 0.02 / 3**0.5, rel=1e-3)
    assert row["bytes_share"] == 110 / 400


def test_rows_are_in_order_and_say_what_failed():
    failed = {"defense": "sign", "stage": "training", "seed": 0, "failed": "the training diverged"}
    rows = summarize([leak("initial", defense=""), failed, leak("initial", victim("naive", None), defense="")])
    assert [row["defense"] for row in rows] == ["none", "sign"]
    assert rows[0]["failed"] is None and rows[1]["failed"] == "the training diverged"


def test_an_interval_of_none_or_all_is_no_point():
    low, high = wilson(0, 6)
    assert low == 0 and high == pytest.approx(0.39, abs=0.01)  # Wilson 1927: z^2 / (n + z^2)
    assert wilson(6, 6) == pytest.approx((1 - high, 1))
