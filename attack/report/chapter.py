"""One recording of the report: what its files say, put into words and numbers that a page can show.

In: a run folder that was attacked and evaluated, and what `gradtap inspect` said of its capture. Everything read here
is text that others may have chosen: the page escapes it.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from torch import Tensor

from attack.answer import ANSWER, TENSORS, read_json, read_tensors, victim_name, whose
from attack.evaluate import EVALUATION, judge_of
from attack.report.passages import Passage, passage
from attack.report.pictures import animation, still
from attack.report.plot import Plot, plot
from attack.shades import Shades
from attack.truth import FOLDER, read_truth
from harness.models import load_tokenizer

MAX_EXAMPLES = 16
"""Pictures shown of one batch: beyond it the page would grow by megabytes."""
METHOD_NAMES = {
    "auto": "No method was started",
    "rgap": "R-GAP (Zhu & Blaschko 2021): solved in closed form, layer by layer",
    "unmix": "Unmixing: a batch taken apart layer by layer, from the features that the last layer gives away",
    "spear": "SPEAR (Dimitrov et al. 2024): a batch taken apart at the first layer, by the units that are off",
    "gauss-newton": "Gauss-Newton: solved from the last layer down as far as that goes, then all pixels together",
    "patterns": "Patterns: which positions passed through max pooling, and then the picture, in turns",
    "coarse": "Coarse: what a defended gradient says, each equation weighed by its error, beside a prior on pictures",
    "residual": "Residual: walked down layer by layer around the shortcuts, then all pixels together",
    "idlg": "iDLG (Zhao et al. 2020): label read, input searched",
    "dlg": "DLG (Zhu, Liu & Han 2019): inputs and labels searched together",
    "inverting-gradients": "Inverting Gradients (Geiping et al. 2020): the gradient's direction, with total variation",
    "gradinversion": "GradInversion (Yin et al. 2021): the gradient and the batch norms' statistics, as a group",
    "dager": "DAGER (Petrov et al. 2024): tokens and sentences from the spans of the first layers' gradients",
    "coarse-text": "Coarse text: each token by the two rows its slope stands in, weighed by how exactly they are known",
    "lamp": "LAMP (Balunović et al. 2022): embeddings searched, and tokens moved in between",
    "tag": "TAG (Deng et al. 2021): embeddings searched, then the nearest tokens",
}
STATUS_WORDS = {
    "converged": "converged",
    "filled": "filled by a prior",
    "not_converged": "not converged",
    "not_observed": "not observed",
}


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Chapter:
    """What the report tells of one recording."""

    title: str
    run: Path
    """Run folder: `attack/` with its evaluation; `truth/`, `lab.json`, `config.json` where they are there."""
    truth: Path | None = None
    """Folder with the truth that the evaluation was made with; None: the run's own."""
    inspect: dict[str, Any] | None = None
    """What `gradtap inspect --json` printed of the capture."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Example:
    """One picture of a batch."""

    caption: str
    original: str | None
    found: str | None
    film: str | None
    psnr_db: float
    mse: float
    ssim: float | None
    label: int
    label_ok: bool


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Victim:
    """One gradient that was attacked."""

    caption: str
    status: str
    status_words: str
    method: str
    facts: dict[str, Any]
    """The entry of `attack.json`."""
    examples: tuple[Example, ...]
    passages: tuple[Passage, ...]
    """The sentences of a batch of text."""
    hidden: int
    """Examples of the batch that are not shown."""
    plot: Plot | None


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class View:
    """A chapter, ready for the page."""

    title: str
    victims: tuple[Victim, ...]
    counts: dict[str, int]
    medians: dict[str, float | None]
    known: list[tuple[str, str]]
    """What the eavesdropper was told."""
    seen: list[tuple[str, str]]
    """What it had to see."""
    wire: list[tuple[str, str]]
    """The capture's figures."""
    notes: list[str]
    made: list[tuple[str, str]]
    """Seed, command and versions."""


def view(chapter: Chapter) -> View:
    """Reads a chapter's files. Raises: AnswerError, naming the file that is missing or damaged and what to run
    first."""
    folder = chapter.run / "attack"
    evaluation = read_json(folder / EVALUATION, hint=f"run first: gradtap evaluate {chapter.run}")
    answer = read_json(folder / ANSWER, hint="run first: gradtap attack")
    tensors = read_tensors(folder / TENSORS, hint="run first: gradtap attack")
    reading = _Reading(answer["knowledge"], tensors, chapter.truth or chapter.run / FOLDER)
    entries = {(entry["rank"], entry["step"]): entry for entry in answer["victims"]}
    victims = tuple(
        _victim(entries[scored["rank"], scored["step"]], scored, reading) for scored in evaluation["victims"]
    )
    config = _optional(chapter.run / "config.json")
    lab = _optional(chapter.run / "lab.json")
    inspect = chapter.inspect or {}
    return View(
        title=chapter.title,
        victims=victims,
        counts=evaluation["counts"],
        medians=evaluation["medians"],
        known=_knowledge(answer["knowledge"]),
        seen=_seen([entry["observation"] for entry in answer["victims"]]),
        wire=_wire(lab, inspect),
        notes=[*_gaps(inspect), *map(str, inspect.get("notes", []))],
        made=_made(answer, config),
    )


class _Reading:
    """Answers beside the truth, of one recording."""

    def __init__(self, knowledge: dict[str, Any], tensors: dict[str, Tensor], truth: Path) -> None:
        self._judge, self._tensors, self._truth = judge_of(knowledge), tensors, truth
        self._shades = Shades.of(knowledge)
        name = knowledge.get("tokenizer")
        self._reader = None if name is None else load_tokenizer(name)

    def examples(
        self, entry: dict[str, Any], scores: list[dict[str, Any]]
    ) -> tuple[tuple[Example, ...], tuple[Passage, ...]]:
        """Pictures, or sentences, of one victim."""
        if not scores:
            return (), ()
        name, tokens = victim_name(entry["rank"], entry["step"]), self._judge.tokens
        originals, _ = read_truth(
            self._truth,
            rank=entry["rank"],
            step=entry["step"],
            ranks=entry["observation"].get("ranks", ()),
            tokens=tokens,
        )
        found, frames = self._tensors[f"{name}.inputs"], self._tensors.get(f"{name}.frames")
        where = f"step {entry['step']}, {whose(entry['rank'])}"
        captions = [
            where + (f", example {index + 1} of {len(scores)}" if len(scores) > 1 else "")
            for index in range(len(scores))
        ]
        if tokens is not None:
            true, own = tokens.rows(originals), tokens.rows(found)
            return (), tuple(
                passage(caption, score, true[score["true_index"]], own[index], self._reader)
                for index, (caption, score) in enumerate(zip(captions, scores, strict=True))
            )
        return tuple(
            Example(
                caption=captions[index],
                original=still(originals[example["true_index"]], self._shades),
                found=still(found[index], self._shades),
                film=None if frames is None else animation(list(frames[:, index]), self._shades),
                psnr_db=example["psnr_db"],
                mse=example["mse"],
                ssim=example["ssim"],
                label=int(self._tensors[f"{name}.labels"][index]),
                label_ok=example["label_ok"],
            )
            for index, example in enumerate(scores[:MAX_EXAMPLES])
        ), ()


def _victim(entry: dict[str, Any], scored: dict[str, Any], reading: _Reading) -> Victim:
    scores = scored["examples"] or []
    examples, passages = reading.examples(entry, scores)
    return Victim(
        caption=f"Step {entry['step']}, {whose(entry['rank'])}",
        status=entry["status"],
        status_words=STATUS_WORDS.get(entry["status"], entry["status"]),
        method=METHOD_NAMES.get(entry["method"], entry["method"]),
        facts=entry,
        examples=examples,
        passages=passages,
        hidden=max(0, len(scores) - len(examples) - len(passages)),
        plot=plot(entry["history"]),
    )


def _optional(path: Path) -> dict[str, Any]:
    return read_json(path, hint="remove it, or run the lab again") if path.exists() else {}


def _told(value: Any) -> str:
    if value is None:
        return "not told"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _knowledge(knowledge: dict[str, Any]) -> list[tuple[str, str]]:
    low, high = knowledge["input_range"]
    shown = knowledge | {
        "input_shape": " × ".join(map(str, knowledge["input_shape"])),
        "input_range": f"{low:g} to {high:g}",
    }
    if knowledge.get("tokens") is not None:
        shown |= {"tokens": f"{knowledge['tokens']['vocab']:,}", "input_range": "tokens"}
    return [(key.replace("_", " "), _told(value)) for key, value in shown.items()]


def _seen(observations: list[dict[str, Any]]) -> list[tuple[str, str]]:
    if not observations:
        return [("gradients", "none")]
    least = min(observation["known_fraction"] for observation in observations)
    exact = min(observation["exact_fraction"] for observation in observations)
    weights = sum(bool(observation["weights_known"]) for observation in observations)
    steps = sorted({observation["step"] for observation in observations})
    defenses = {str(observation["defense"] or "none") for observation in observations}
    return [
        ("gradients", f"{len(observations)}, of steps {steps[0]} to {steps[-1]}"),
        ("read from", ", ".join(sorted({str(observation["exchange"]) for observation in observations}))),
        ("numbers in each gradient", f"{observations[0]['parameters']:,}"),
        ("share of them known", "all" if least == 1 else f"at least {100 * least:.4g} %"),
        ("known to the bit", "all" if exact == 1 else f"at least {100 * exact:.4g} %"),
        ("model weights known", f"for {weights} of {len(observations)} gradients"),
        ("defense of the sender", ", ".join(sorted(defenses))),
    ]


def _wire(lab: dict[str, Any], inspect: dict[str, Any]) -> list[tuple[str, str]]:
    rows = [
        (word, f"{lab[key]:,}")
        for key, word in (("packets", "packets"), ("bytes", "bytes"), ("dropped", "packets dropped"))
        if isinstance(lab.get(key), int)
    ]
    protocols = inspect.get("protocols")
    if protocols:
        rows.append(("protocols", ", ".join(map(str, protocols))))
    if "flows" in inspect:
        rows.append(("connections", str(len(inspect["flows"]))))
    if "encrypted" in inspect:
        rows.append(("encrypted", "yes" if inspect["encrypted"] else "no"))
    if inspect.get("world_size"):
        rows.append(("ranks", str(inspect["world_size"])))
    if "gaps" in inspect:
        rows.append(("holes", str(len(inspect["gaps"]))))
    return rows


def _gaps(inspect: dict[str, Any]) -> list[str]:
    return [
        ", ".join(f"{key} {value}" for key, value in gap.items()) if isinstance(gap, dict) else str(gap)
        for gap in inspect.get("gaps", [])
    ]


def _made(answer: dict[str, Any], config: dict[str, Any]) -> list[tuple[str, str]]:
    rows = [
        ("attack", f"method {answer['method']}, seed {answer['seed']}, device {answer['device']}"),
        ("attack's versions", ", ".join(f"{name} {version}" for name, version in answer["versions"].items())),
    ]
    command = config.get("command")
    if command:
        rows.append(("job's command", " ".join(map(str, command)) if isinstance(command, list) else str(command)))
    train = config.get("train")
    if isinstance(train, dict):
        rows.append(("job", ", ".join(f"{key} {value}" for key, value in train.items())))
    if isinstance(config.get("versions"), dict):
        rows.append(("job's versions", ", ".join(f"{name} {version}" for name, version in config["versions"].items())))
    return rows
