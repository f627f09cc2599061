"""One recording of a defended job -> what two attackers read out of it, and how near to the truth that is.

The adaptive one goes by what the wire and the configuration say of the defense, and gives no picture that it cannot
stand for. The naive one takes what was sent for the gradient, as published attacks do, and always shows its best match;
it is told that there is one example, as those are.
The truth is opened after both have answered.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import re
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from attack.answer import to_plain
from attack.buffers import complete_buffers
from attack.inference.source import Source
from attack.metrics import score
from attack.observation import Knowledge, Observation
from attack.pool import Tell, work_in_processes
from attack.reconstruct import best_match, reconstruct
from attack.recurrence import join_steps
from attack.report.pictures import still
from attack.shades import Shades
from attack.text_metrics import score_text
from attack.truth import read_truth
from harness.models import Tokenizer, load_tokenizer

CLOCK = time.process_time
"""That of deadlines: what an attack finds is to depend on no other work of the machine."""
NAIVE, NAIVE_TEXT = "idlg", "lamp"
"""The published attacks that the naive one makes, on pictures and on text."""


class Attacker(enum.StrEnum):
    """Who attacks."""

    NAIVE = "naive"
    ADAPTIVE = "adaptive"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """How both attack. Times are CPU seconds, so that a sweep on a busy machine comes to the same."""

    seed: int = 0
    adaptive_s: float = 60.0
    """Longest time for one victim."""
    naive_s: float = 15.0
    """The same; its search takes the longer the more hopeless it is."""
    processes: int = 1
    """Victims at once."""
    pictures: int = 4
    """Victims of which the pictures are kept."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class _Found:
    """What an attacker has to show for one victim."""

    status: str | None = None
    method: str | None = None
    inputs: Tensor | None = None
    labels: Tensor | None = None
    predicted_mse: float | None = None
    cpu_seconds: float = 0.0
    reason: str | None = "its gradient was not seen"


_Task = tuple[Observation, Attacker]


def measure(
    capture: Path,
    truth: Path,
    knowledge: Knowledge,
    *,
    optimizer: str,
    defense: str,
    plan: Plan,
    one_batch: bool = False,
) -> dict[str, Any]:
    """Both attackers on every victim of a recording. Blocks until they are done.

    Args:
        truth: folder in which the job sealed its batches; each counts, also one that the wire did not show.
        optimizer: the job's update rule, which is declared.
        defense: the sender's, which is declared where the wire does not say it.
        one_batch: each rank has one batch at all steps, which is declared, too: it counts once.

    Returns: plain values: `known_fraction`; `cpu_seconds`, of all attacks; `victims[]`, an entry for each victim and
        attacker; `pictures[]`, data URIs, or, of text, the sentences.

    Raises: TapError, AnswerError: the recording or the truth cannot be read. WorkerDied.
    """
    seen = list(complete_buffers(Source(capture, optimizer=optimizer).observations()))
    if one_batch:
        seen = list(join_steps(seen, every=1))
    found: dict[tuple[int, int, Attacker], _Found] = {}
    # What may take longest first, so that processes end at about one time.
    attackers = reversed(Attacker) if defense else [Attacker.ADAPTIVE]
    tasks = [(one, attacker) for attacker in attackers for one in seen]

    def ended(index: int, answer: _Found) -> None:
        observation, attacker = tasks[index]
        found[observation.step, observation.rank, attacker] = answer

    attack = functools.partial(_attack, knowledge, defense, plan)
    if plan.processes > 1:
        work_in_processes(attack, tasks, plan.processes, told=lambda index, progress: None, ended=ended)
    else:
        for index, task in enumerate(tasks):
            ended(index, attack(task, lambda progress: None))
    reader = None if knowledge.tokenizer is None else load_tokenizer(knowledge.tokenizer)
    shades = Shades.of(knowledge.summary())

    def draw(example: Tensor) -> str | None:
        return still(example, shades) if reader is None else reader.decode(example.tolist())

    victims: list[dict[str, Any]] = []
    pictures: list[dict[str, Any]] = []
    for step, rank in [(step, rank) for step, rank in sealed(truth) if step == 0 or not one_batch]:
        true_inputs, true_labels = read_truth(truth, rank=rank, step=step, tokens=knowledge.tokens)
        shown: dict[str, Any] = {"step": step, "rank": rank, "original": draw(true_inputs[0])}
        for attacker in Attacker:
            # Without a defense there is nothing to adapt to, or to ignore.
            answer = found.get((step, rank, attacker if defense else Attacker.ADAPTIVE), _Found())
            entry = _scored(answer, true_inputs, true_labels, knowledge, reader)
            victims.append({"step": step, "rank": rank, "attacker": attacker.value, **entry})
            shown[attacker] = None if answer.inputs is None else draw(answer.inputs[0])
            shown[f"{attacker}_psnr_db"] = entry["psnr_db"]
        pictures.append(shown)
    known = sum(one.known_fraction for one in seen) / len(seen) if seen else 0.0
    plain: dict[str, Any] = to_plain(
        {
            "known_fraction": known,
            "cpu_seconds": sum(answer.cpu_seconds for answer in found.values()),
            "victims": victims,
            "pictures": pictures[: plan.pictures],
        }
    )
    return plain


def sealed(truth: Path) -> list[tuple[int, int]]:
    """(step, rank) of every batch that the job sealed, in order."""
    names = (re.fullmatch(r"step(\d+)\.rank(\d+)\.(safetensors|npz)", file.name) for file in truth.glob("step*"))
    return sorted((int(name[1]), int(name[2])) for name in names if name)


def _attack(knowledge: Knowledge, defense: str, plan: Plan, task: _Task, tell: Tell) -> _Found:
    observation, attacker = task
    began = time.process_time()
    if attacker is Attacker.NAIVE:
        literal, alone = _mean(observation).taken_literally(), dataclasses.replace(knowledge, batch_size=1)
        method = NAIVE if knowledge.tokens is None else NAIVE_TEXT
        shown = best_match(literal, alone, method=method, seed=plan.seed, deadline_s=plan.naive_s, clock=CLOCK)
        kind = torch.float32 if knowledge.tokens is None else torch.int64
        return _Found(
            method=method,
            inputs=None if shown.inputs is None else shown.inputs.detach().to(kind),
            labels=shown.labels,
            cpu_seconds=time.process_time() - began,
            reason=shown.reason,
        )
    told = _told(observation, defense)
    answer = reconstruct(told, knowledge, seed=plan.seed, deadline_s=plan.adaptive_s, progress=tell, clock=CLOCK)
    return _Found(
        status=answer.status.value,
        method=answer.method,
        inputs=answer.inputs,
        labels=answer.labels,
        predicted_mse=answer.predicted_mse,
        cpu_seconds=answer.cpu_seconds,
        reason=answer.reason,
    )


def _told(observation: Observation, defense: str) -> Observation:
    """With the defense that is declared, where the wire does not say it."""
    again = tuple(_told(other, defense) for other in observation.again)
    return dataclasses.replace(observation, average=None, defense=observation.defense or defense or None, again=again)


def _mean(observation: Observation) -> Observation:
    """What was sent of one batch, its mean over the steps."""
    sent = torch.stack([step.gradient for step in (observation, *observation.again)])
    return dataclasses.replace(observation, gradient=sent.mean(0), again=())


def _scored(
    answer: _Found, true_inputs: Tensor, true_labels: Tensor, knowledge: Knowledge, reader: Tokenizer | None
) -> dict[str, Any]:
    entry = {name: getattr(answer, name) for name in ("status", "method", "predicted_mse", "cpu_seconds", "reason")}
    scores: dict[str, Any] = {"mse": None, "psnr_db": None, "ssim": None, "label_ok": False}
    if knowledge.tokens is not None:
        scores = {"token_accuracy": 0.0, "exact": 0, "rougeL": 0.0, "label_ok": False}
        if answer.inputs is not None:
            assert answer.labels is not None
            own, true = (answer.inputs, answer.labels), (true_inputs, true_labels)
            text = score_text(*own, *true, tokens=knowledge.tokens, reader=reader)
            scores = {name: getattr(text, name) for name in scores}
        scores["psnr_db"] = None
    elif answer.inputs is not None and answer.inputs.shape == true_inputs.shape and answer.inputs.isfinite().all():
        assert answer.labels is not None
        whole = score(answer.inputs, answer.labels, true_inputs, true_labels, input_range=knowledge.input_range)
        scores = {name: getattr(whole, name) for name in scores}
    return entry | scores
