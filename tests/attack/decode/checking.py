"""Holds observations against the truth of a job: the line that matters most is that nothing known is wrong."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from attack.observation import Known, Observation
from tests.attack.decode.job import Job


def bits(values: np.ndarray) -> np.ndarray:
    """To compare as bits: zeros of either sign differ, and not-a-number equals itself."""
    return np.ascontiguousarray(values).view(np.uint32)


def check(job: Job, observations: Iterable[Observation]) -> list[Observation]:
    """Fails where one element is said to be known and is not the rank's own; returns the observations."""
    found = list(observations)
    for seen in found:
        where = f"rank {seen.rank}, step {seen.step}"
        assert (seen.step, seen.rank) in job.gradients or not seen.known.any(), f"{where}: there was no such gradient"
        if (seen.step, seen.rank) not in job.gradients:
            continue
        truth, got, known = job.gradients[seen.step, seen.rank], seen.gradient.numpy(), seen.known.numpy()
        raw, differenced = known == Known.RAW, known >= Known.DIFFERENCED
        assert got.shape == truth.shape, where
        assert (bits(got[raw]) == bits(truth[raw])).all(), f"{where}: a RAW element is wrong"
        if differenced.any():
            assert seen.bound is not None, where
            error = np.abs(got[differenced].astype(np.float64) - truth[differenced])
            assert (error <= seen.bound.numpy()[differenced]).all(), f"{where}: beyond its bound"
        if seen.weights is not None:
            assert (bits(seen.weights.numpy()) == bits(job.weights[seen.step])).all(), f"{where}: wrong weights"
        if seen.buffers is not None:
            assert (bits(seen.buffers.numpy()) == bits(job.buffer_values)).all(), f"{where}: wrong buffers"
    order = [(seen.step, seen.rank) for seen in found]
    assert order == sorted(set(order)), "steps and ranks in order, each once"
    return found
