"""Victims that are done, each on disk at once: an interrupted attack loses those under way, and goes on from the rest.

    OUT/kept/step{S}.rank{R}.safetensors    a reconstruction: its tensors, and as JSON in the metadata all else, the
                                            question that it answers, and the digest of what was seen of the victim

Where several ranks attack, this folder is where their answers meet. A file is there whole or not at all, and counts
only for the very question and the very observation that it was made for. One that is damaged counts as not there.
Knows nothing of how victims are attacked.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from attack.algorithms import Reconstruction, Status
from attack.answer import to_plain, victim_name
from attack.errors import AnswerError, AttackError
from attack.files import unfinished, write_atomically
from attack.observation import Observation

FOLDER = "kept"
KEY = "gradtap"
FORMAT = 1


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Victim:
    """One rank at one step: all that is to be remembered of it while it is attacked elsewhere, or later."""

    rank: int
    step: int
    summary: dict[str, Any]
    """`Observation.summary`."""
    digest: str
    """SHA-256 of everything that was seen."""

    @classmethod
    def of(cls, seen: Observation) -> Victim:
        """Reads through all of the observation."""
        summary: dict[str, Any] = to_plain(seen.summary())
        digest = hashlib.sha256(json.dumps(summary).encode())
        for field in dataclasses.fields(seen):
            value = getattr(seen, field.name)
            if isinstance(value, Tensor):
                digest.update(field.name.encode())
                digest.update(value.contiguous().numpy().data)
        for other in seen.again:
            digest.update(cls.of(other).digest.encode())
        return cls(rank=seen.rank, step=seen.step, summary=summary, digest=digest.hexdigest())

    @property
    def name(self) -> str:
        """How its tensors and files are called."""
        return victim_name(self.rank, self.step)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Kept:
    """The answers to one question that lie in a folder."""

    out: Path
    """The attack's folder."""
    question: dict[str, Any]
    """What decides an answer beside the observation; plain values."""
    overwrite: bool = False
    """Whether answers to another question count as not there, instead of standing in the way."""

    @property
    def folder(self) -> Path:
        """Where the files are."""
        return self.out / FOLDER

    def write(self, victim: Victim, found: Reconstruction) -> None:
        """Keeps an answer; once it returns, not even a power failure takes it. Raises: OSError."""
        values = {field.name: getattr(found, field.name) for field in dataclasses.fields(found)}
        tensors = {name: value.contiguous() for name, value in values.items() if isinstance(value, Tensor)}
        document = {
            "version": FORMAT,
            "question": self.question,
            "digest": victim.digest,
            "found": {name: value for name, value in values.items() if name not in tensors},
        }
        content = safetensors.torch.save(tensors, {KEY: json.dumps(document)})
        write_atomically(self._path(victim), content, durable=True)

    def digests(self) -> frozenset[str]:
        """Of the victims that are kept. Raises: AttackError: something in the folder answers another question."""
        documents = map(self._document, sorted(self.folder.glob("*.safetensors")))
        return frozenset(document["digest"] for document in documents if document is not None)

    def status(self, victim: Victim) -> Status | None:
        """How a victim ended; None where it is not kept.

        Raises: AttackError: what is kept of it answers another question, or is of other traffic.
        """
        document = self._document(self._path(victim), victim)
        return None if document is None else Status(document["found"]["status"])

    def read(self, victim: Victim) -> Reconstruction:
        """What was kept, to the bit. Raises: AttackError, as `status`; AnswerError where nothing is."""
        document = self._document(self._path(victim), victim)
        if document is None:
            raise AnswerError(
                f"{self._path(victim)}: it was there, and is gone; did something else write to this folder?"
            )
        fields = document["found"] | {
            "status": Status(document["found"]["status"]),
            "history": tuple((iteration, residual) for iteration, residual in document["found"]["history"]),
            "frame_iterations": tuple(document["found"]["frame_iterations"]),
            "steps": tuple(document["found"]["steps"]),
        }
        with safe_open(self._path(victim), framework="pt") as file:
            fields |= {name: file.get_tensor(name) for name in file.keys()}
        return Reconstruction(**fields)

    def forget(self, victims: Iterable[Victim]) -> None:
        """Removes what was kept of these victims, and the folder where nothing else is left in it."""
        for victim in victims:
            path = self._path(victim)
            path.unlink(missing_ok=True)
            unfinished(path).unlink(missing_ok=True)
        if self.folder.is_dir() and not any(self.folder.iterdir()):
            self.folder.rmdir()

    def _path(self, victim: Victim) -> Path:
        return self.folder / f"{victim.name}.safetensors"

    def _document(self, path: Path, victim: Victim | None = None) -> dict[str, Any] | None:
        try:
            with safe_open(path, framework="pt") as file:
                document: dict[str, Any] = json.loads((file.metadata() or {})[KEY])
        except (OSError, SafetensorError, KeyError, ValueError):
            return None
        if document.get("version") != FORMAT:
            return None
        other = _difference(document["question"], self.question)
        if other is None and victim is not None and document["digest"] != victim.digest:
            other = "it was attacked in other traffic"
        if other is None:
            return document
        if self.overwrite:
            return None
        raise AttackError(
            f"{path}: an interrupted attack kept this victim, and {other}; go on with what it was asked, name another "
            "folder, or add --overwrite to start anew"
        )


def _difference(kept: dict[str, Any], asked: dict[str, Any], within: str = "") -> str | None:
    """What differs first, for people; None where nothing does."""
    for name in sorted(kept.keys() | asked.keys()):
        was, now = kept.get(name), asked.get(name)
        if isinstance(was, dict) and isinstance(now, dict):
            deeper = _difference(was, now, f"{within}{name} ")
            if deeper is not None:
                return deeper
        elif was != now:
            return f"its {within}{name} was {was}, not {now}"
    return None
