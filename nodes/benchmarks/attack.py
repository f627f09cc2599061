"""`bench attack`: pictures read back out of recorded traffic, beside the published loop on the very same gradients.

For every picture a job of its own, with fresh weights, trains one step in the lab; its capture is decoded, and all that
are compared attack the gradient and the weights that were decoded. Only the scoring sees the picture. CPU seconds of
one thread; ours include reading the capture and predicting the answer's error.

A published loop takes all its steps, as released: it has no way to tell that it has arrived. When it first was there is
noted beside it, so that both readings of what it costs are in the result.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from torch import Tensor

from attack.answer import to_plain
from attack.decode.recording import Recording
from attack.observation import Knowledge, Observation
from attack.reconstruct import reconstruct
from harness.config import TrainConfig
from harness.data import PictureSet, batch_at, load_pictures
from harness.errors import ConfigError, GradtapError
from harness.models import load_model
from harness.seeding import derive
from nodes.benchmarks.base import Benchmark
from nodes.benchmarks.published import deep_leakage, read_label
from nodes.commands.base import Result
from nodes.commands.lab import Lab
from nodes.console import console, table
from nodes.lab import CAPTURE_NAME

MODEL, CLASSES = "lenet", 100
SOLVED = 1e-4
"""Mean squared error, pictures from 0 to 1, below which a picture counts as read back."""
OURS = "gradtap attack"
REFERENCES = {"dlg": "published loop, DLG", "idlg": "published loop, iDLG"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Attack(Benchmark):
    """Pictures read back from captures of real jobs, beside the published loop (Deep Leakage from Gradients) on the
    same gradients: solved is a mean squared error below 1e-4, for a loop at any of its steps; ratio is the baseline's
    CPU seconds for each solved picture over this case's, and with a clock that the truth stops in the second column.
    """

    images: int = 20
    """Pictures of each kind, with fresh weights each."""
    kinds: tuple[str, ...] = ("cifar100", "photos")
    """Data sets of 3x32x32 pictures."""
    exchange: str = "zeromq"
    """What the jobs talk over: zeromq, allreduce or ddp."""
    references: tuple[str, ...] = ("dlg", "idlg")
    """Published loops to run beside ours: dlg, idlg. The first is the baseline."""
    outer_steps: int = 300
    """Of a published loop, each up to 20 iterations of L-BFGS; the released code takes 300."""
    seed: int = 0
    """Fixes weights, pictures and starts."""

    def run(self) -> Result:
        """Records, attacks, scores. Raises: GradtapError where a job fails or its capture does not decode."""
        self.check_positive("images", "outer_steps")
        for name in self.references:
            if name not in REFERENCES:
                raise ConfigError(f"bench: --references: wanted some of {', '.join(REFERENCES)}, got {name}")
        torch.set_num_threads(1)
        jobs = [(kind, index) for kind in self.kinds for index in range(self.images)]
        rows: list[dict[str, Any]] = []
        with tempfile.TemporaryDirectory(prefix="gradtap-bench-") as folder:
            for kind, index in track(jobs, description="attack", console=console, transient=True):
                rows += self._job(Path(folder) / f"{kind}{index}", kind, index)
        names = [*(REFERENCES[name] for name in self.references), OURS]
        cases = [summarize(name, [row for row in rows if row["name"] == name]) for name in names]
        for case in cases:
            case |= {"baseline": names[0]} | {
                ratio: cases[0][key] / case[key] if case[key] and cases[0][key] else None
                for ratio, key in (("ratio", "cpu_s_per_solved"), ("ratio_stopped", "stopped_cpu_s_per_solved"))
            }
        return self.report([to_plain(case) for case in (*cases, *rows)], text=_text(cases))

    def _job(self, folder: Path, kind: str, index: int) -> list[dict[str, Any]]:
        seed = derive(self.seed, "bench attack", kind, index) % 2**31
        capture, picture, label, rank = self._record(folder, kind, index, seed)
        began = time.process_time()
        (seen,) = [each for each in Recording(capture).observations() if each.rank == rank]
        reading_s = time.process_time() - began
        attacks: dict[str, Callable[[], dict[str, Any]]] = {OURS: lambda: _ours(seen, picture, reading_s)}
        for name in self.references:
            attacks[REFERENCES[name]] = functools.partial(self._reference, name, seen, picture, seed)
        rows = []
        for name in random.Random(seed).sample(sorted(attacks), len(attacks)):
            row = attacks[name]()
            found = row.pop("label")
            rows.append({"name": name, "kind": kind, "image": index, **row, "label_ok": found == label})
        return rows

    def _record(self, folder: Path, kind: str, index: int, seed: int) -> tuple[Path, Tensor, int, int]:
        """The capture of one step of a job, a picture of it with its label, and the rank that took it."""
        data, workers = load_pictures(kind), 1 if self.exchange == "zeromq" else 2
        if data.input_shape != (3, 32, 32) or data.classes > CLASSES:
            raise ConfigError(f"bench: --kinds: wanted 3x32x32 pictures of at most {CLASSES} classes, got {kind}")
        folder.mkdir()
        chosen = [(index + other) % len(data.pictures) for other in range(workers)]
        # CIFAR-100's own binary format: a coarse label, the label, the picture.
        rows = [bytes([0, int(data.labels[at])]) + data.pictures[at].tobytes() for at in chosen]
        (folder / "train.bin").write_bytes(b"".join(rows))
        spec = f"cifar100:path={folder}"
        train = TrainConfig(
            model=MODEL, data=spec, steps=1, seed=seed, exchange=self.exchange, truth=False, tensorboard=False
        )
        recorded = Lab(out=folder / "run", num_workers=workers, ring_mib=32, train=train).run()
        if not recorded.ok:
            raise GradtapError(f"bench attack: {recorded.text}")
        rank = next(
            rank for rank in range(workers) if self._takes(load_pictures(spec), seed, rank, workers, chosen, data)
        )
        picture = torch.from_numpy(data.pictures[index % len(data.pictures)]).float() / 255
        return folder / "run" / CAPTURE_NAME, picture, int(data.labels[chosen[0]]), rank

    def _takes(
        self, small: PictureSet, seed: int, rank: int, workers: int, chosen: list[int], data: PictureSet
    ) -> bool:
        """Whether this rank took the first of the job's pictures."""
        batch = batch_at(small, seed=seed, step=0, rank=rank, world_size=workers, batch_size=1)
        return bool((batch.inputs[0] * 255).round().to(torch.uint8).equal(torch.from_numpy(data.pictures[chosen[0]])))

    def _reference(self, name: str, seen: Observation, picture: Tensor, seed: int) -> dict[str, Any]:
        model = load_model(MODEL)
        assert seen.weights is not None
        torch.nn.utils.vector_to_parameters(seen.weights, model.parameters())
        sizes = [math.prod(shape) for shape in seen.shapes]
        parts = zip(seen.gradient.split(sizes), seen.shapes, strict=True)
        gradients = [part.view(shape) for part, shape in parts]
        steps = 0
        best = math.inf
        arrived: tuple[int, float] | None = None
        began = time.process_time()

        def watch(inputs: Tensor) -> None:
            nonlocal steps, best, arrived
            steps += 1
            mse = float((inputs[0] - picture).square().mean())
            best = min(best, mse)
            if mse < SOLVED and arrived is None:
                arrived = steps, time.process_time() - began

        _, label = deep_leakage(
            model,
            gradients,
            picture.shape,
            CLASSES,
            watch=watch,
            generator=torch.Generator().manual_seed(seed),
            label=read_label(gradients) if name == "idlg" else None,
            outer_steps=self.outer_steps,
        )
        cpu_s = time.process_time() - began
        return {
            **_score(best),
            "label": int(label),
            "cpu_s": cpu_s,
            "outer_steps": steps,
            "solved_at_step": arrived and arrived[0],
            "stopped_cpu_s": arrived[1] if arrived else cpu_s,
        }


def _ours(seen: Observation, picture: Tensor, reading_s: float) -> dict[str, Any]:
    """Batch size and label are not told."""
    found = reconstruct(seen, Knowledge(model=MODEL, input_shape=tuple(picture.shape)))
    score = {"mse": None, "psnr_db": None, "solved": False}
    if found.inputs is not None and len(found.inputs) == 1:
        score = _score(float((found.inputs[0] - picture).square().mean()))
    cpu_s = found.cpu_seconds + reading_s
    return {
        **score,
        "label": None if found.labels is None else int(found.labels[0]),
        "cpu_s": cpu_s,
        "stopped_cpu_s": cpu_s,
        "method": found.method,
        "status": found.status.value,
        "predicted_mse": found.predicted_mse,
    }


def _score(mse: float) -> dict[str, Any]:
    finite = math.isfinite(mse)
    return {
        "mse": mse if finite else None,
        "psnr_db": -10 * math.log10(max(mse, 1e-20)) if finite else None,
        "solved": finite and mse < SOLVED,
    }


def summarize(name: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Of one attack on all pictures."""
    solved = [row for row in rows if row["solved"]]
    total, stopped = (sum(row[key] for row in rows) for key in ("cpu_s", "stopped_cpu_s"))
    return {
        "name": name,
        "pictures": len(rows),
        "solved": len(solved),
        "labels_right": sum(row["label_ok"] for row in rows),
        "solved_with_label": sum(row["label_ok"] for row in solved),
        "median_psnr_db": statistics.median(row["psnr_db"] for row in solved) if solved else None,
        "least_psnr_db": min((row["psnr_db"] for row in solved), default=None),
        "median_cpu_s_of_solved": statistics.median(row["stopped_cpu_s"] for row in solved) if solved else None,
        "cpu_s": total,
        "cpu_s_per_solved": total / len(solved) if solved else None,
        "stopped_cpu_s_per_solved": stopped / len(solved) if solved else None,
    }


def _text(cases: list[dict[str, Any]]) -> str:
    keys = (
        "name", "pictures", "solved", "labels_right", "median_psnr_db", "cpu_s_per_solved", "ratio",
        "stopped_cpu_s_per_solved", "ratio_stopped",
    )  # fmt: skip
    head = [
        "attack", "pictures", "solved", "labels right", "PSNR dB", "CPU s a solved one", "ratio",
        "stopped at the truth", "ratio",
    ]  # fmt: skip
    return table(head, [[case[key] for key in keys] for case in cases])
