"""How near an answer is to the truth: mean squared error, PSNR, SSIM, labels, and which example is which.

In: an answer and the truth, in model input units, with the declared input range. Only an evaluation, after an attack
has written its answer, may call this; an attack has no truth to pass.
"""

from __future__ import annotations

import dataclasses
import math
import statistics

import torch
from scipy.optimize import linear_sum_assignment
from skimage.metrics import structural_similarity
from torch import Tensor

InputRange = tuple[float, float] | tuple[Tensor, Tensor]
"""Lowest and highest value: of all elements, or by channel, shape (channels, 1, 1)."""

MAX_PSNR_DB = 200.0
"""Given for equal pictures, whose PSNR is infinite: a number that JSON, a table and a median can hold."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ExampleScore:
    """One example of a batch, beside the true example that it was matched to."""

    true_index: int
    """Which example of the true batch it was matched to: a gradient does not keep the order."""
    mse: float
    psnr_db: float
    ssim: float | None
    """None for what is not a picture."""
    label_ok: bool


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Score:
    """A batch: means over its examples."""

    mse: float
    psnr_db: float
    ssim: float | None
    label_accuracy: float
    """Share of examples with the right label, 0 to 1."""
    examples: tuple[ExampleScore, ...]

    @property
    def label_ok(self) -> bool:
        """Whether every label is right."""
        return self.label_accuracy == 1


def score(
    inputs: Tensor, labels: Tensor, true_inputs: Tensor, true_labels: Tensor, *, input_range: InputRange
) -> Score:
    """Compares a batch with the truth, each example with the one that the best matching gives it.

    Raises: ValueError: the batches differ in shape.
    """
    if inputs.shape != true_inputs.shape:
        raise ValueError(f"score: wanted the truth's shape {tuple(true_inputs.shape)}, got {tuple(inputs.shape)}")
    examples = tuple(
        ExampleScore(
            true_index=true,
            mse=mse(inputs[own], true_inputs[true]),
            psnr_db=psnr_db(inputs[own], true_inputs[true], input_range=input_range),
            ssim=ssim(inputs[own], true_inputs[true], input_range=input_range),
            label_ok=int(labels[own]) == int(true_labels[true]),
        )
        for own, true in enumerate(match(inputs, true_inputs))
    )
    similarities = [example.ssim for example in examples if example.ssim is not None]
    return Score(
        mse=statistics.fmean(example.mse for example in examples),
        psnr_db=statistics.fmean(example.psnr_db for example in examples),
        ssim=statistics.fmean(similarities) if similarities else None,
        label_accuracy=statistics.fmean(example.label_ok for example in examples),
        examples=examples,
    )


def match(inputs: Tensor, true_inputs: Tensor) -> list[int]:
    """For each example, the true one that it is matched to: the pairing with the least total squared error (Hungarian
    method)."""
    own, true = inputs.flatten(1).double(), true_inputs.flatten(1).double()
    costs = torch.cdist(own, true, compute_mode="donot_use_mm_for_euclid_dist").square()
    return [int(column) for column in linear_sum_assignment(costs.numpy())[1]]


def mse(picture: Tensor, truth: Tensor) -> float:
    """Mean squared error over all elements, in squared model input units."""
    return float((picture.double() - truth.double()).square().mean())


def psnr_db(picture: Tensor, truth: Tensor, *, input_range: InputRange) -> float:
    """10 log10(range^2 / mse) in dB, at most `MAX_PSNR_DB`. The data range is the declared input range, not the span of
    either picture."""
    span = input_range[1] - input_range[0]
    error = mse(picture / span, truth / span)
    return min(MAX_PSNR_DB, -10 * math.log10(error)) if error else MAX_PSNR_DB


def ssim(picture: Tensor, truth: Tensor, *, input_range: InputRange) -> float | None:
    """Structural similarity, mean over channels and positions; None for what is not (channels, height, width).

    The settings of Wang et al. 2004: Gaussian window of 11 x 11 with sigma 1.5, K1 = 0.01, K2 = 0.03, covariances
    without Bessel's correction, and the declared input range as data range. Pictures smaller than 11 have a uniform
    window of 7, 5 or 3, the largest that fits.
    """
    if picture.ndim != 3 or min(picture.shape[1:]) < 3:
        return None
    side, span = min(picture.shape[1:]), input_range[1] - input_range[0]
    window = {"gaussian_weights": True, "sigma": 1.5} if side >= 11 else {"win_size": min(7, side - 1 + side % 2)}
    return float(
        structural_similarity(
            ((picture - input_range[0]) / span).double().numpy(),
            ((truth - input_range[0]) / span).double().numpy(),
            data_range=1.0,
            channel_axis=0,
            use_sample_covariance=False,
            **window,
        )
    )
