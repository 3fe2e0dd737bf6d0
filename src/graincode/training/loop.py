"""The training loop of both stages."""

from __future__ import annotations

import logging
import math
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from graincode.core.errors import GraincodeError, brief, check
from graincode.core.losses import Term, as_count, weighted_sum
from graincode.core.rng import SampleRng
from graincode.core.schedules import warmup_cosine
from graincode.data.loader import Schedule, Stalled, load_batches
from graincode.distributed import collectives
from graincode.distributed.hardware import Machine, full_state, load_training_state, training_state
from graincode.distributed.signals import Interruption, Stopped
from graincode.runs.checkpoint import Checkpoints, read_about, read_state
from graincode.runs.run import Run
from graincode.training.ema import AveragedWeights
from graincode.training.monitors import FiniteNumbers, Meter, Speed, check_equal_weights, check_weights, early_read
from graincode.training.settings import TrainerConfig
from graincode.training.stage import MakeOptimizer, Prepared, Stage, Step, StepOutput
from graincode.training.trackers import LogSettings, RunLog

log = logging.getLogger(__name__)

_STATE = {
    "evaluated": bool, "metrics": dict, "best": float, "flops": int | float, "trainables": dict,
    "average": dict | None, "scaler": dict | None, "meter": dict,
}  # fmt: skip


@dataclass
class Progress:
    """Where a run stands."""

    step: int = 0  # steps done
    evaluated: bool = True  # whether the evaluation after that step, if there is to be one, is done
    metrics: dict[str, float] = field(default_factory=dict)  # of the last evaluation
    best: float = math.inf  # least objective so far


class Training:
    """The training of a stage, from where its run stands to the end.

    `start` is called before step 1, and not when a run goes on.

    Every step is a function of (state, seed, step), whatever the number of processes and micro-batches. So an
    interrupted run that goes on gives what an uninterrupted one gives, and it may go on with other hardware. States go
    to the run's `state/`, metrics to its `log.jsonl`.
    """

    def __init__(
        self, stage: Stage, machine: Machine, make_optimizer: MakeOptimizer, trainer: TrainerConfig, seed: int,
        run: Run, logs: LogSettings, start: Callable[[], None] = lambda: None,
    ) -> None:  # fmt: skip
        self.stage, self.machine, self.trainer, self.directory = stage, machine, trainer, run
        self.schedule = _schedule(stage, machine, trainer.batch_size, seed)
        self.checkpoints = Checkpoints(run.path / "state", trainer.keep_checkpoints)
        state = _find_state(self.checkpoints, trainer, run)
        self.plain = stage.trainables[0].module.to(machine.device)
        if state is None:
            start()
        self.flops = _training_flops(stage, machine, self.schedule) if state is None else state["flops"]
        self.average = AveragedWeights(self.plain, trainer.ema_decay, machine)
        self.prepared = [Prepared.on(machine, trainable, make_optimizer) for trainable in stage.trainables]
        self.meter, self.at = Meter(), Progress()
        if state is not None:
            self._load(state)
        del state
        self.wrapped = {one.trainable.name: one.wrapped for one in self.prepared}
        self.finite = FiniteNumbers(run.path / "nonfinite.json", self.wrapped, self.schedule, self.checkpoints)
        self.speed = Speed(machine, trainer.batch_size, self.flops)
        is_main, step = collectives.is_main(), self.at.step
        self.log = RunLog(run.path, step, self.at.evaluated, logs, run.config) if is_main else None
        self.shows, self.draws = logs.tracker is not None, logs.tracker is not None and is_main
        self.bar = tqdm(total=trainer.steps, initial=step, unit="step", dynamic_ncols=True, mininterval=1.0,
                        disable=not is_main)  # fmt: skip
        self.batches = load_batches(stage.dataset, self.schedule.batches(step, trainer.steps), machine.hardware.workers)

    def run(self) -> tuple[nn.Module, dict[str, float]]:
        """Train to the end; returns the module to export, in evaluation mode, and the metrics of its evaluation. Raises
        GraincodeError if a number is not finite or weights differ between processes, Stopped after a signal."""
        try:
            with Interruption() as interruption:
                try:
                    self._loop(interruption)
                except Stalled:  # in a step that has changed nothing yet, or behind a state, in its evaluation
                    raise self._stopped_alone(interruption) from None
            return self._exported()
        finally:
            self.bar.close()
            self.batches.close()
            if self.log is not None:
                self.log.close()

    def _loop(self, interruption: Interruption) -> None:
        trainer, at = self.trainer, self.at
        while True:
            if not at.evaluated:
                self._evaluate()
            if at.step == trainer.steps:
                return
            step, last = at.step + 1, at.step + 1 == trainer.steps
            factor = warmup_cosine(step, trainer.steps, trainer.warmup_steps)
            stop = self._step(step, factor, interruption)
            at.step = step
            self.average.update(self.prepared[0].trained, at.step)
            if at.step % trainer.log_every == 0 or last:
                self._report(factor)
            self.bar.update()
            at.evaluated = not (at.step % trainer.eval_every == 0 or last)
            # after an evaluation's step the state is saved first: the evaluation is then done again where a run goes on
            if at.step % trainer.checkpoint_every == 0 or not at.evaluated or stop:
                self._save()
            if stop:
                raise _stopped(interruption, at.step)

    def _stopped_alone(self, interruption: Interruption) -> Stopped:
        """Save what can be saved without the other processes."""
        if collectives.count() == 1:
            self._save()
        stopped = _stopped(interruption, next(iter(self.checkpoints.steps()), 0))
        stopped.together = False
        return stopped

    def _step(self, number: int, factor: float, interruption: Interruption) -> bool:
        """One optimizer step of every trainable; returns whether some process was asked to stop."""
        machine, schedule, processes = self.machine, self.schedule, collectives.count()
        prepared = [one for one in self.prepared if one.trainable.trains(number)]
        for one in prepared:
            one.wrapped.train()
            for group, rate in zip(one.optimizer.param_groups, one.base_rates, strict=True):
                group["lr"] = rate * factor
        micro_batches = [self._micro_batch(number, part) for part in range(schedule.micro_batches)]
        counts: list[Mapping[str, Tensor] | None] = [None] * len(prepared)  # the terms' own
        if schedule.micro_batches * processes > 1:
            counts, asked = self._global_counts(prepared, [batch for batch, _ in micro_batches], interruption)
            stop = early_read(asked)
        totals: dict[str, Tensor | float] = defaultdict(float)
        outputs: list[list[StepOutput]] = [[] for _ in prepared]
        for part, (batch, step) in enumerate(micro_batches):
            # dropout: other numbers for every micro-batch, whichever process it comes to
            machine.seed(((schedule.seed << 40) + schedule.positions(number, part).start) % (1 << 63))
            output = None
            for index, one in enumerate(prepared):
                with machine.micro_batch(one.wrapped, part == schedule.micro_batches - 1):
                    with machine.accelerator.autocast():
                        output = one.trainable.forward(one.wrapped, batch, step, output)
                    loss = weighted_sum(output.terms, counts[index])
                    # gradients are averaged over the processes, but these losses are parts of one sum
                    machine.accelerator.backward(loss * processes)
                self.meter.add(output.terms)
                self.meter.add_histograms(one.trainable.histograms(output))
                for name, term in output.terms.items():
                    totals[name] += term.total.detach().double()
                if index == 0:
                    totals["loss"] += loss.detach().double()
                outputs[index].append(replace(output, terms={}, reconstruction=None))
        once = 1 / processes  # a step counts as one, however many processes add it up
        self.meter.add({"loss": Term(totals["loss"], once)})
        for one, own in zip(prepared, outputs, strict=True):
            norm = machine.clip_gradients(one.wrapped, self.trainer.clip_grad_norm or math.inf).detach()
            one.optimizer.step()
            one.optimizer.zero_grad()
            one.trainable.update(one.trained, own)
            if not one.optimizer.step_was_skipped:  # as where fp16's loss scale was too high, and is lowered
                name = "gradient_norm" if one is self.prepared[0] else f"gradient_norm_{one.trainable.name}"
                self.meter.add({name: Term(norm.double() * once, once)})
                totals[name] = norm.double()
        self.finite.add(number, totals)
        self.speed.steps += 1
        return stop() > 0 if processes > 1 else interruption.signal is not None

    def _micro_batch(self, number: int, part: int) -> tuple[Any, Step]:
        began = time.perf_counter()
        batch = next(self.batches)
        self.speed.waited += time.perf_counter() - began
        positions, device = self.schedule.positions(number, part), self.machine.device
        rng = SampleRng(self.schedule.seed, torch.arange(positions.start, positions.stop, device=device))
        return self.stage.prepare(batch.to(device), rng), Step(number, rng)

    def _global_counts(
        self, prepared: list[Prepared], batches: list[Any], interruption: Interruption
    ) -> tuple[list[Mapping[str, Tensor]], Tensor]:
        """Counts of each trainable's terms in the whole step, and how many processes were asked to stop."""
        stop = torch.full((1,), float(interruption.signal is not None), dtype=torch.float64, device=self.machine.device)
        counts = [[one.trainable.counts(batch) for batch in batches] for one in prepared]
        flat = [sum(as_count(part[name], stop) for part in parts) for parts in counts for name in parts[0]]
        joined = collectives.sum_(torch.cat([stop, *(count[None] for count in flat)]))
        images, found = as_count(self.schedule.batch_size, stop), iter(joined[1:].unbind())
        return [defaultdict(lambda: images, {name: next(found) for name in parts[0]}) for parts in counts], joined[:1]

    def _evaluate(self) -> None:
        at = self.at
        with self.average.in_use(self.prepared[0].trained) as module:
            at.metrics = self._metrics(module, at.step)
        at.evaluated = True
        if self.log is not None:
            self.log.scalars(at.step, {f"val/{name}": value for name, value in at.metrics.items()})
        if at.metrics["objective"] < at.best:
            at.best = at.metrics["objective"]
            collectives.on_main(partial(self.checkpoints.mark_best, at.step, at.metrics))
        self.speed.restart()

    def _metrics(self, module: nn.Module, step: int | None) -> dict[str, float]:
        """Evaluate a module, and log its pictures, as of a step if there is one."""
        evaluation = self.stage.evaluate(module, self.trainer.eval_images, draw=self.draws)
        if self.log is not None:
            self.log.pictures(step, evaluation.pictures)
        return evaluation.metrics

    def _report(self, factor: float) -> None:
        """Log the means of the interval that ends."""
        values = self.meter.flush() | {"learning_rate": self.prepared[0].base_rates[0] * factor}
        self.finite.check()
        rates = self.speed.metrics(values.pop("tokens_per_image", None))
        if "padding_share" in values:
            rates["speed/padding_share"] = values.pop("padding_share")
        if skipped := getattr(self.stage.dataset, "skipped", 0):
            rates["data/skipped_images"] = skipped
        if self.log is not None:
            self.log.scalars(self.at.step, {f"train/{name}": value for name, value in values.items()} | rates)
        shown = {"loss": f"{values['loss']:.4f}", "images_per_s": f"{rates['speed/images_per_second']:.0f}"}
        self.bar.set_postfix(shown, refresh=False)

    def _save(self) -> None:
        self.finite.check()
        check_equal_weights(self.wrapped)
        scaler = self.machine.accelerator.scaler
        state = asdict(self.at) | {
            "trainables": {one.trainable.name: training_state(one.wrapped, one.optimizer) for one in self.prepared},
            "average": self.average.state(),
            "scaler": None if scaler is None else scaler.state_dict(),
            "meter": self.meter.state(),
            "flops": self.flops,
        }
        collectives.on_main(self.directory.check_owner)
        collectives.on_main(lambda: self.finite.check_state(self.at.step, state))
        collectives.on_main(lambda: self.checkpoints.save(self.at.step, state, self.directory.identity))

    def _load(self, state: dict[str, Any]) -> None:
        path, steps = self.checkpoints.path(state["step"]), self.trainer.steps
        try:
            self._restore(state)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            line = f"{path} is not of this training ({brief(error)})"
            raise GraincodeError(f"{line}: remove it, to go on from the state before") from error
        log.info("going on from step %d", self.at.step)
        before, step = read_about(path)["identity"].get("trainer.steps", steps), self.at.step
        if before != steps and step < steps:
            old, new = (warmup_cosine(*at, self.trainer.warmup_steps) for at in ((step, before), (step + 1, steps)))
            what = "the learning rate, which was %.3g of its largest in step %d of %d, is %.3g in step %d of %d"
            log.info(what, old, step, before, new, step + 1, steps)

    def _restore(self, state: dict[str, Any]) -> None:
        self.at = Progress(**{known.name: state[known.name] for known in fields(Progress)})
        check_weights(state)
        for one in self.prepared:
            load_training_state(one.wrapped, one.optimizer, state["trainables"][one.trainable.name])
            for parameter, moments in one.optimizer.state.items():
                shapes = {value.shape for value in moments.values() if isinstance(value, Tensor) and value.ndim}
                if shapes - {parameter.shape}:
                    raise ValueError(f"moments of {shapes} for weights of {tuple(parameter.shape)}")
        scaler = self.machine.accelerator.scaler
        if scaler is not None and state["scaler"] is not None:
            scaler.load_state_dict(state["scaler"])
        if self.machine.is_sharded:  # what was trained is a copy
            self.plain.load_state_dict(full_state(self.prepared[0].trained))
        self.average.load_state(state["average"])
        self.meter.load_state(state["meter"], self.machine.device)

    def _exported(self) -> tuple[nn.Module, dict[str, float]]:
        """The module to export with its last weights, or those of the best evaluation, and their metrics."""
        best, metrics = self.checkpoints.best, self.at.metrics
        with self.average.in_use(self.prepared[0].trained) as module:
            if self.trainer.export == "best" and best.get("step", self.at.step) != self.at.step:
                state, metrics = read_state(self.checkpoints.path(best["step"])), best["metrics"]
                weights = state["trainables"][self.prepared[0].trainable.name]["module"]
                module.load_state_dict(weights if state["average"] is None else state["average"])
                log.info("the weights of step %d are exported, whose evaluation was the best", best["step"])
                if self.shows:  # files show what is exported
                    self._metrics(module, None)
        return module.eval(), metrics


def _stopped(interruption: Interruption, step: int) -> Stopped:
    name = interruption.signal.name if interruption.signal else "a signal to another process"
    return Stopped(f"stopped by {name} after step {step}, state saved: the same command goes on")


def _schedule(stage: Stage, machine: Machine, batch_size: int, seed: int) -> Schedule:
    processes, parts = collectives.count(), machine.hardware.gradient_accumulation
    expected = f"a multiple of {processes * parts}, for {processes} processes x {parts} micro-batches"
    check("batch_size", batch_size, expected, batch_size % (processes * parts) == 0)
    return Schedule(len(stage.dataset), batch_size, seed, collectives.rank(), processes, parts, stage.windows)


def _find_state(checkpoints: Checkpoints, trainer: TrainerConfig, run: Run) -> dict[str, Any] | None:
    """The state to go on from, the same on all processes, or None to begin at step 1."""
    resume = trainer.resume
    expected = f"auto, as {checkpoints.folder} has states up to step {next(iter(checkpoints.steps()), 0)}"
    check("resume", resume, expected, resume != "never" or not checkpoints.steps())
    if (state := checkpoints.load()) is not None:
        path = checkpoints.path(state["step"])
        run.check_state(path, read_about(path)["identity"])
    if state is None and run.result is not None:
        line = f"{run.path} is finished, but its export cannot be loaded, and there is no state to make it from"
        raise GraincodeError(f"{line}: choose another run_name")
    if state is None and resume not in ("auto", "never"):
        before = read_about(Path(resume))["identity"]
        differing = run.differing_start(before)
        check("resume", resume, f"a state of a run with the same settings but for steps ({differing})", not differing)
        if others := run.differing({**run.identity, **{k: v for k, v in before.items() if k in run.images}}):
            log.warning("%s is of a run on other images, and goes on with those of now (%s)", resume, others)
        state = read_state(Path(resume)) | {"best": math.inf}
        # as its own, so that its evaluation can be the best
        collectives.on_main(lambda: checkpoints.save(state["step"], state, run.identity))
    found = 0 if state is None else state["step"]
    if state is not None and (wrong := [k for k, kind in _STATE.items() if not isinstance(state.get(k), kind)]):
        line = f"{checkpoints.path(found)} is no state of a training ({', '.join(wrong)})"
        raise GraincodeError(f"{line}: remove it, to go on from the state before")
    check("steps", trainer.steps, f"{found} or more, as so many are done", found <= trainer.steps)
    collectives.check_agreement("the step to go on from", found)
    collectives.on_main(lambda: checkpoints.set_aside_after(found))
    return state


def _training_flops(stage: Stage, machine: Machine, schedule: Schedule) -> float:
    """FLOPs of the first trainable's training on one item, counted on four, of any length."""
    trainable, count = stage.trainables[0], min(4, schedule.batch_size)
    batch = stage.dataset[schedule.stream(range(count))].to(machine.device)
    step = Step(0, SampleRng(0, torch.arange(count, device=machine.device)))
    with FlopCounterMode(display=False) as counter:
        loss = weighted_sum(trainable.forward(trainable.module.eval(), batch, step, None).terms)
        torch.autograd.grad(loss, list(trainable.module.parameters()), allow_unused=True)
    return counter.get_total_flops() / count
