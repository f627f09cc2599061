"""One rank's training: batch -> gradient -> defenses -> exchange -> update, step after step. Knows no socket, and not
who listens."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from harness.checkpoint import (
    last_checkpoint,
    load_checkpoint,
    load_remembered,
    load_weights,
    save_checkpoint,
    save_remembered,
)
from harness.config import TrainConfig
from harness.data import Dataset, batch_at, load_data
from harness.defenses import Moment, load_defense
from harness.errors import ConfigError
from harness.exchange.base import Exchange
from harness.gradients import example_gradients, mean_gradient
from harness.models import LOSSES, MODELS, load_model, load_normalize, load_optimizer
from harness.models.spec import parse_spec
from harness.privacy import Accountant
from harness.runlog import RunLog
from harness.seeding import derive
from harness.types import Batch, Gradients


def resolve_model(spec: str, data: Dataset, loss: str) -> str:
    """The model's full name: a built-in model takes from the data set what its own options leave out."""
    name = spec.partition(":")[0]
    if name not in MODELS:
        return spec
    options = data.model_options(loss) | parse_spec(spec)[1]
    values = {key: "x".join(map(str, value)) if isinstance(value, tuple) else value for key, value in options.items()}
    return f"{name}:" + ",".join(f"{key}={value}" for key, value in values.items())


class Trainer:
    """A rank's model, update rule and place in the run."""

    def __init__(self, config: TrainConfig, *, rank: int, world_size: int) -> None:
        """Builds everything that the seed fixes. Raises: ConfigError, DataError, ModelError, CheckpointError."""
        self.rank, self.world_size = rank, world_size
        self.device = _device(config.device, rank)
        self.data = load_data(config.data)
        if config.loss not in LOSSES:
            raise ConfigError(f"loss {config.loss!r} is not known; there are: {', '.join(LOSSES)}")
        self.loss = LOSSES[config.loss]
        try:
            self.normalize = load_normalize(config.normalize) if config.normalize else None
        except ValueError as error:
            raise ConfigError(str(error)) from error
        model = resolve_model(config.model, self.data, config.loss)
        self.config = config = dataclasses.replace(config, model=model)
        torch.manual_seed(derive(config.seed, "weights"))
        self.model: nn.Module = load_model(config.model).to(self.device).train()
        if config.weights:
            load_weights(Path(config.weights), self.model)
        self._check_fit()
        try:
            self.rule = load_optimizer(config.optimizer, self.model.parameters())
        except ValueError as error:
            raise ConfigError(str(error)) from error
        self.defense = load_defense(config.defense).fit(self.model)
        if self.defense.momentum and self.rule.momentum:
            raise ConfigError(
                f"defense {config.defense!r} has momentum in place of the optimizer's, and {config.optimizer!r} too; "
                "take sgd:lr=... without momentum, or topk-dgc:...,momentum=0"
            )
        if self.defense.summed and config.exchange == "zeromq":
            raise ConfigError(
                f"defense {config.defense!r} sums factors, which zeromq does not: take --exchange allreduce or ddp, or "
                "powersgd, which sends each rank's own"
            )
        private = self.defense.private
        self.accountant = (
            None
            if private is None
            else Accountant(
                defense=private, examples=len(self.data), batch_size=config.batch_size, world_size=world_size
            )
        )
        """Where the defense is differentially private."""
        self.sizes = tuple(parameter.numel() for parameter in self.model.parameters())
        self.remembered = self.defense.begin(self.sizes)
        """What the defense keeps from step to step."""
        self.steps_done = 0

    def resume(self, run: Path) -> None:
        """Goes on from the last checkpoint of this run. Raises: CheckpointError."""
        ranks = self.world_size if self.remembered else 0
        file = last_checkpoint(run, ranks=ranks)
        self.steps_done = load_checkpoint(
            file,
            model=self.model,
            rule=self.rule,
            config=self.config,
            world_size=self.world_size,
        )
        if ranks:
            self.remembered = load_remembered(file, rank=self.rank, like=self.remembered)

    def train(
        self, exchange: Exchange, *, run: Path | None = None, progress: Callable[[int, Gradients], Any] | None = None
    ) -> None:
        """Trains until `config.steps` steps are done.

        Args:
            exchange: this rank's end; not yet started.
            run: where to log; None logs nothing.
            progress: called after each step with its number and this rank's gradients.
        """
        torch.set_num_threads(self.config.threads)
        torch.use_deterministic_algorithms(True)
        log = run and RunLog(run, rank=self.rank, tensorboard=self.config.tensorboard, first_step=self.steps_done)
        try:
            exchange.start(self.model, step=self.steps_done)
            while self.steps_done < self.config.steps:
                gradients = self._step(exchange, log or None)
                if progress is not None:
                    progress(self.steps_done - 1, gradients)
                every = self.config.checkpoint_every
                if run and every and self.steps_done % every == 0:
                    self.save(run)
            if run and self.rank == 0 and self.accountant:
                self.accountant.spent(self.steps_done).write(run)
        finally:
            if log:
                log.close()

    def save(self, run: Path) -> None:
        """Writes this rank's part of a checkpoint of this moment: what its defense remembers; rank 0 the rest, too."""
        if self.remembered:
            save_remembered(run, step=self.steps_done, rank=self.rank, remembered=self.remembered)
        if self.rank == 0:
            save_checkpoint(
                run,
                step=self.steps_done,
                model=self.model,
                rule=self.rule,
                config=self.config,
                world_size=self.world_size,
            )

    def _step(self, exchange: Exchange, log: RunLog | None) -> Gradients:
        step, clock = self.steps_done, _Clock()
        batch = self._batch(step)
        self._seed_forward(step)
        gradients, exposed = self._gradient(batch, step)
        clock.lap("gradient")
        if log and self.config.truth:
            log.truth(step, batch=batch, gradient=gradients.flat, model=self.model)
            clock.lap("truth")
        before = exchange.traffic.bytes_out, exchange.traffic.bytes_in
        sent, self.remembered = self.defense(
            exposed, self.sizes, self.remembered, seed=self.config.seed, rank=self.rank, step=step
        )
        clock.lap("defense")
        average = exchange.average(sent, step=step).to(self.device)
        clock.lap("exchange")
        self._update(average)
        clock.lap("update")
        if log:
            log.step(
                step,
                gradients=gradients,
                bytes_out=exchange.traffic.bytes_out - before[0],
                bytes_in=exchange.traffic.bytes_in - before[1],
                seconds=clock.seconds,
                cpu_seconds=clock.cpu_seconds,
                privacy={"epsilon_links": self.accountant.epsilon(step + 1)} if self.accountant else {},
            )
        self.steps_done += 1
        return gradients

    def _seed_forward(self, step: int) -> None:
        """Dropout and the like draw from the global generator: the same at this rank and step, resumed or not."""
        torch.manual_seed(derive(self.config.seed, "forward", self.rank, step))

    def _gradient(self, batch: Batch, step: int) -> tuple[Gradients, Tensor]:
        """The rank's own gradient, and what the defense makes of its examples or of the batch where it does."""
        of_examples, of_batch = self.defense.of_examples, self.defense.of_batch
        if of_examples is None:
            gradients = mean_gradient(self.model, self.loss, batch)
            if of_batch is None:
                return gradients, gradients.flat
            self._seed_forward(step)  # a second pass, with the same draws
            return gradients, of_batch(gradients.flat, self.model, batch)
        each = example_gradients(self.model, self.loss, batch)
        moment = Moment(seed=self.config.seed, rank=self.rank, step=step)
        return each.mean(), of_examples(each.examples, moment)

    def _update(self, average: Tensor) -> None:
        at = 0
        for parameter in self.model.parameters():
            parameter.grad = average[at : at + parameter.numel()].view_as(parameter)
            at += parameter.numel()
        self.rule.step()
        # The exchange owns the average's memory and may write the next one there.
        self.rule.zero_grad()

    def _batch(self, step: int) -> Batch:
        batch = batch_at(
            self.data,
            seed=self.config.seed,
            step=step,
            rank=self.rank,
            world_size=self.world_size,
            batch_size=self.config.batch_size,
            loss=self.config.loss,
        )
        inputs = batch.inputs if self.normalize is None else self.normalize(batch.inputs)
        return Batch(inputs=inputs.to(self.device), labels=batch.labels.to(self.device))

    def _check_fit(self) -> None:
        """Finds a model that does not fit the data here, in one line, and not at step 0 in a traceback."""
        classes = self.data.outputs(self.config.loss)
        batch = self._batch(0)
        self.model.eval()  # batch norm in training mode would take note of this batch
        try:
            with torch.no_grad():
                logits, _ = self.loss.aligned(self.model(batch.inputs), batch.labels)
        except (RuntimeError, ValueError, IndexError) as error:
            raise ConfigError(
                f"model {self.config.model!r} does not take the {self.data.kind} of {self.data.name}, "
                f"{self.data.size}: {str(error).splitlines()[0]}"
            ) from error
        self.model.train()
        if logits.shape[1] < classes:
            raise ConfigError(
                f"model {self.config.model!r} puts out {logits.shape[1]} classes; {self.data.name} needs {classes} or "
                "more"
            )


class _Clock:
    """Wall seconds by part of a step, and CPU seconds of all threads of this process."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.cpu_seconds: dict[str, float] = {}
        self.last = time.perf_counter(), time.process_time()

    def lap(self, part: str) -> None:
        now = time.perf_counter(), time.process_time()
        self.seconds[part], self.cpu_seconds[part] = now[0] - self.last[0], now[1] - self.last[1]
        self.last = now


def _device(name: str, rank: int) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        if not torch.cuda.is_available():
            raise ConfigError("device cuda: torch sees no GPU here; take --device cpu or auto")
        return torch.device("cuda", rank % torch.cuda.device_count())
    try:
        return torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"device {name!r}: {str(error).splitlines()[0]}") from error
