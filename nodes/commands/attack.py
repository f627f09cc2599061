"""`gradtap attack FILE --model M --out DIR`: reconstructs the batches behind the gradients that a capture shows."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import tyro
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from attack.algorithms import Status
from attack.answer import whose
from attack.buffers import complete_buffers
from attack.decode.recording import Recording
from attack.errors import CaptureError
from attack.inference.source import Source
from attack.observation import Knowledge, Observation
from attack.reconstruct import DEADLINE_S
from attack.recurrence import join_steps
from attack.shades import input_range_of
from attack.victims import Listener, Plan, Share, VictimProgress, attack_all
from harness.defenses import load_defense
from harness.errors import ConfigError
from harness.models import Tokens, load_model, load_tokenizer
from harness.models.spec import parse_spec
from nodes.commands.base import Command, Result
from nodes.console import console, table
from nodes.signals import sigterm_interrupts


@dataclasses.dataclass(frozen=True, kw_only=True)
class Attack(Command):
    """Reconstructs the batches behind the gradients that a capture, or what `decode` wrote of one, shows."""

    file: tyro.conf.Positional[Path]
    """Capture file (pcapng, pcap), or observations (safetensors) that `gradtap decode` wrote."""
    model: str
    """The public architecture: a built-in name with options, package.module:factory, or path/file.py:factory."""
    out: Path
    """Folder for attack.json, reconstructions.safetensors and pictures; `gradtap evaluate RUN` looks in RUN/attack."""
    method: str = "auto"
    """auto (picks, and says why), dlg, idlg, inverting-gradients, gradinversion, rgap (one example, in closed form),
    patterns (one example through max pooling), residual (one through a residual network with batch norm), coarse (one
    example, its gradient rounded, noisy or pruned), unmix (batches of fully connected nets, exactly) or gauss-newton
    (batches of convolutional ones). Of text: dager (exact), lamp or tag (searches)."""
    defense: str | None = None
    """The sender's defense (docs/defenses.md), where you know it and the traffic does not say it: that of noise."""
    naive: bool = False
    """Take what was sent for the gradient, as if there were no defense; otherwise the attack adapts to it."""
    victim: str | None = None
    """rank:R for one rank; left out: all that were observed."""
    steps: str | None = None
    """A:B for steps A to B - 1, or one step; left out: all that were observed."""
    same_batch_every: int | None = None
    """If each rank's batch comes again after so many steps (1: it is always the same one), say so: the steps that hold
    it are solved together, and tell more than each by itself."""
    group: str | None = None
    """The process group whose gradients to attack, as `inspect` names it; left out: the first that exchanges any."""
    batch_size: int | None = None
    """Examples in a rank's batch, if you know it."""
    labels: tuple[int, ...] | None = None
    """The batch's labels, if you know them."""
    input_shape: str | None = None
    """Shape of one input, e.g. 3x32x32; needed where the model does not say it itself (its attribute input_shape)."""
    input_range: tuple[float, float] = (0.0, 1.0)
    """Lowest and highest value of an input, where it is not normalized."""
    normalize: str | None = None
    """Mean and deviation by which the job normalizes its pictures, by channel or one for all, e.g.
    mean=0.485/0.456/0.406,std=0.229/0.224/0.225; or unknown, where it may do so. Left out: it does not."""
    tokenizer: str | None = None
    """For text: minilm, or the path of a tokenizer.json, to read the tokens that were found. No attack needs it."""
    batch_norm: str | None = None
    """train or eval: whether the job's batch norms normalize by the batch or by running statistics; left out: found
    out from the wire."""
    loss: str = "cross_entropy"
    """The job's loss."""
    optimizer: str | None = None
    """The job's update rule, e.g. sgd:lr=0.1 (docs/optimizers.md), if you know it. Left out, it is inferred from the
    traffic; where that cannot be done, only the first step's weights are known."""
    device: str = "auto"
    """cpu, cuda, or auto: a GPU where there is one."""
    seed: int = 0
    """Fixes every random draw."""
    deadline_s: float = DEADLINE_S
    """Longest time for one victim, in seconds."""
    processes: int | None = None
    """Victims attacked at once; left out: one for each core."""
    overwrite: bool = False
    """Forget what an interrupted attack with other options, or of other traffic, left in OUT/kept."""

    def run(self) -> Result:
        """Decodes, attacks, writes the answer. Under torchrun, each rank attacks its share of the victims."""
        with sigterm_interrupts():
            return self._run(share_of_victims())

    def _run(self, share: Share) -> Result:
        input_shape, tokens = self._inputs()  # a wrong model should not wait for the file
        source = Source(self.file, optimizer=self.optimizer)
        knowledge = Knowledge(
            model=self.model,
            loss=self.loss,
            input_shape=input_shape,
            input_range=self._range(),
            normalize=self.normalize,
            tokens=tokens,
            tokenizer=self.tokenizer,
            batch_size=self.batch_size,
            labels=self.labels,
            batch_norm=self.batch_norm,
            optimizer=source.rule.optimizer,
            optimizer_source=source.rule.source.value,
            optimizer_evidence=source.rule.evidence,
        )
        if self.defense is not None:
            load_defense(self.defense)  # a wrong name says so
            if self.naive:
                raise ConfigError("naive: has no use for a defense; leave out one of the two")
        plan = Plan(
            method=self.method,
            seed=self.seed,
            device=self.device,
            deadline_s=self.deadline_s,
            processes=self.processes,
        )
        chosen = self._chosen(complete_buffers(source.observations()))
        if self.same_batch_every is not None:
            chosen = join_steps(chosen, every=self.same_batch_every)
        with listening() if share.rank == 0 else contextlib.nullcontext(_unheard) as listener:
            answer = attack_all(
                chosen, knowledge, self.out, plan=plan, share=share, overwrite=self.overwrite, listener=listener
            )
        if answer is None:
            return Result(json={}, text="", quiet=True)
        victims = answer["victims"]
        text = f"{_text(victims, self.out)}\n{source.text()}"
        if not victims:
            reason = self._nothing()
            return Result(
                json=answer | source.summary() | {"status": Status.NOT_OBSERVED, "reason": reason},
                text=f"{Status.NOT_OBSERVED}: {reason}",
                ok=False,
            )
        ok = any(victim["status"] in ("converged", "filled") for victim in victims)
        return Result(json=answer | source.summary(), text=text, ok=ok)

    def _nothing(self) -> str:
        """Why there is nobody to attack, in one line."""
        try:
            found = Recording(self.file).inspect()
        except CaptureError:
            return f"{self.file} holds no observation that was asked for"
        if found["steps"]:
            return "no gradient of a rank, step or group that was asked for is in the capture"
        sealed = sorted({f"{entry['mechanism']}" for entry in found["sealed"]})
        if sealed:
            return f"the traffic is encrypted ({', '.join(sealed)}), and no gradient can be decoded"
        return "; ".join(["no gradient can be decoded", *found["notes"][:3]])

    def _inputs(self) -> tuple[tuple[int, ...], Tokens | None]:
        """Their shape, and what tokens they are made of. Raises: ConfigError, ModelError."""
        model = load_model(self.model)
        tokens: Tokens | None = getattr(model, "tokens", None)
        if self.tokenizer is not None:
            try:
                vocab = load_tokenizer(self.tokenizer).vocab
            except ValueError as error:
                raise ConfigError(str(error)) from error
            if tokens is None or vocab > tokens.vocab:
                takes = "none" if tokens is None else str(tokens.vocab)
                raise ConfigError(
                    f"tokenizer {self.tokenizer!r} has {vocab} tokens, model {self.model!r} takes {takes}"
                )
        if self.input_shape is not None:
            shape = parse_spec(f"model:input={self.input_shape}")[1]["input"]
            shape = (shape,) if isinstance(shape, int) else shape
            if not isinstance(shape, tuple):
                raise ConfigError(f"input-shape: wanted sizes such as 3x32x32, got {self.input_shape}")
            return shape, tokens
        shape = getattr(model, "input_shape", None)
        if shape is None:
            raise ConfigError(f"model {self.model!r} does not say its input's shape; add e.g. --input-shape 3x32x32")
        return tuple(shape), tokens

    def _range(self) -> tuple[float, float]:
        """Of the model's inputs. Raises: ConfigError."""
        if self.normalize is None:
            return self.input_range
        if self.input_range != (0.0, 1.0):
            raise ConfigError("input-range: normalize is of pictures from 0 to 1; leave out one of the two")
        try:
            return input_range_of(self.normalize)
        except ValueError as error:
            raise ConfigError(str(error)) from error

    def _chosen(self, seen: Iterable[Observation]) -> Iterator[Observation]:
        rank = _number(r"rank:(\d+)", self.victim, "victim: wanted rank:R")
        first, last = 0, None
        if self.steps is not None:
            match = re.fullmatch(r"(\d+)(?::(\d+))?", self.steps)
            if match is None:
                raise ConfigError(f"steps: wanted A:B or one step, got {self.steps}")
            first = int(match[1])
            last = int(match[2]) if match[2] else first + 1
        group: str | None = self.group
        for index, observation in enumerate(seen):
            if not index and group is None:
                group = observation.group
            if observation.group != group:
                continue
            if last is not None and observation.step >= last:
                return
            if observation.step >= first and rank in (None, observation.rank):
                # An attack has no use for what the other ranks sent too.
                seen_alone = dataclasses.replace(observation, average=None)
                if self.naive:
                    yield seen_alone.taken_literally()
                else:
                    yield dataclasses.replace(seen_alone, defense=observation.defense or self.defense)


@contextlib.contextmanager
def listening() -> Iterator[Listener]:
    """Shows how far the attack is: a bar on a terminal, elsewhere a line for each victim that is done."""
    columns = (
        TextColumn("attacking"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[now]}"),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("attacking", total=None, now="")

        def listen(news: VictimProgress) -> None:
            where = f"step {news.step} {whose(news.rank)}"
            bar.update(task, total=news.total, completed=news.done, now=f"{where}: {_now(news)}")
            if news.status is not None and not console.is_terminal:
                console.print(f"{where}: {news.status}{', kept from before' if news.kept else ''}", markup=False)

        yield listen


def _unheard(_: VictimProgress) -> None:
    """Under torchrun, one rank speaks."""


def share_of_victims() -> Share:
    """This process's, as torchrun tells it; all of them, where it was not started by that."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    if not all(os.environ.get(name, "").isdigit() for name in names):
        return Share()
    rank, size, local_rank, local_size = (int(os.environ[name]) for name in names)
    return Share(rank=rank, size=size, local_rank=local_rank, local_size=local_size)


def _now(news: VictimProgress) -> str:
    if news.now is None:
        return str(news.status)
    return f"{news.now.method}, residual {news.now.residual:.1e}, at most {news.now.seconds_left:.0f} s left"


def _number(pattern: str, text: str | None, wanted: str) -> int | None:
    if text is None:
        return None
    match = re.fullmatch(pattern, text)
    if match is None:
        raise ConfigError(f"{wanted}, got {text}")
    return int(match[1])


def _steps(victim: dict[str, Any]) -> str:
    others = len(victim["steps"]) - 1
    return f"{victim['step']} and {others} more" if others > 0 else str(victim["step"])


def _text(victims: list[dict[str, Any]], out: Path) -> str:
    rows = [
        [
            _steps(v),
            whose(v["rank"]),
            v["status"],
            v["method"],
            v["seconds"],
            v["gradient_residual"],
            v["predicted_mse"],
        ]
        for v in victims
    ]
    lines = [table(["step", "of", "status", "method", "seconds", "residual", "predicted MSE"], rows)]
    lines += [f"step {v['step']} {whose(v['rank'])}: {v['reason']}" for v in victims if v.get("reason")]
    lines += sorted({v["batch_norm"] for v in victims if v.get("batch_norm")})
    return "\n".join([*lines, str(out)])
