"""The training loop of both stages."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from graincode.core.errors import GraincodeError
from graincode.core.losses import Term, as_count, weighted_sum
from graincode.core.rng import SampleRng
from graincode.core.schedules import warmup_cosine
from graincode.data.loader import Schedule, training_loader
from graincode.distributed import collectives
from graincode.distributed.hardware import Machine, full_state, load_training_state, training_state
from graincode.distributed.signals import Interruption, Stopped
from graincode.runs.checkpoint import Checkpoints, read_about, read_state
from graincode.runs.run import Run
from graincode.training.ema import AveragedWeights
from graincode.training.meter import Meter
from graincode.training.monitors import _Health, _Speed, _Vote, check_equal_weights
from graincode.training.settings import TrainerConfig
from graincode.training.stage import Player, Stage, Step
from graincode.training.trackers import LogSettings, RunLog

log = logging.getLogger(__name__)


@dataclass
class _Seat:
    """A player at the table: as it is called in training, and what moves it."""

    player: Player
    wrapped: nn.Module
    optimizer: torch.optim.Optimizer
    base_rates: list[float]

    @property
    def trained(self) -> nn.Module:
        """Its module without the wrapper that exchanges gradients."""
        return self.wrapped.module if isinstance(self.wrapped, nn.parallel.DistributedDataParallel) else self.wrapped


def train(
    stage: Stage,
    machine: Machine,
    make_optimizer: Callable[[list[dict[str, Any]]], torch.optim.Optimizer],
    trainer: TrainerConfig,
    seed: int,
    run: Run,
    logs: LogSettings,
    start: Callable[[], None] = lambda: None,
) -> tuple[nn.Module, dict[str, float]]:
    """Train a stage from where its run stands to the end.

    Every step is a function of (state, seed, step), whatever the number of processes and micro-batches. So an
    interrupted run that goes on gives what an uninterrupted one gives, and it may go on with other hardware.

    Args:
        stage: modules, data and losses.
        machine: this process's device, and its part among the others.
        make_optimizer: from parameter groups; one for each player.
        trainer: lengths and intervals.
        seed: of batches, dropout and all other random numbers.
        run: states go to its `state/`, figures to its `log.jsonl`.
        logs: what else is logged.
        start: done once before step 1, not when a run goes on.
    Returns:
        the module to export, in evaluation mode, and the figures of the evaluation that it had.
    Raises:
        GraincodeError: the loss is no longer finite, the batch cannot be divided, or a state is damaged.
        Stopped: a signal came; the state is saved.
    """
    schedule = _schedule(stage, machine, trainer, seed)
    checkpoints = Checkpoints(run.path / "state", trainer.keep_checkpoints)
    state = _find_state(checkpoints, trainer, run)
    plain = stage.players[0].module.to(machine.device)
    if state is None:
        start()
    flops = _training_flops(stage, machine, schedule) if state is None else state["flops"]
    average = AveragedWeights(plain, trainer.ema_decay, machine)
    seats = [_seat(player, machine, make_optimizer) for player in stage.players]
    scaler, meter = machine.accelerator.scaler, Meter()
    step, figures, best, evaluated = 0, {}, math.inf, True
    if state is not None:
        # the state after an evaluation's step is saved before the evaluation, which is then done again
        step, figures, best, evaluated = (state[key] for key in ("step", "figures", "best", "evaluated"))
        for seat in seats:
            load_training_state(seat.wrapped, seat.optimizer, state["players"][seat.player.name])
        if scaler is not None and state["scaler"] is not None:
            scaler.load_state_dict(state["scaler"])
        if machine.is_sharded:  # what was trained is a copy
            plain.load_state_dict(full_state(seats[0].trained))
        average.load_state(state["average"])
        meter.load_state(state["meter"], machine.device)
        log.info("going on from step %d", step)
    del state
    is_main = collectives.is_main()
    run_log = RunLog(run.path, step, evaluated, logs, run.config) if is_main else None
    speed, health = _Speed(machine, trainer.batch_size, flops), _Health()
    batches = training_loader(
        stage.dataset, schedule, step, trainer.steps, machine.hardware.workers, machine.device.type == "cuda"
    )
    bar = tqdm(total=trainer.steps, initial=step, unit="step", dynamic_ncols=True, mininterval=1.0, disable=not is_main)

    def save() -> None:
        health.check(run, seats, schedule, checkpoints)
        check_equal_weights({seat.player.name: seat.wrapped for seat in seats})
        state = {
            "players": {seat.player.name: training_state(seat.wrapped, seat.optimizer) for seat in seats},
            "average": average.state(),
            "scaler": None if scaler is None else scaler.state_dict(),
            "meter": meter.state(),
            "figures": figures,
            "best": best,
            "evaluated": evaluated,
            "flops": flops,
        }
        collectives.on_main(lambda: checkpoints.save(step, state, identity=run.identity))

    try:
        with Interruption() as interruption:
            while True:
                if not evaluated:
                    with average.in_use(seats[0].trained) as module:
                        figures = stage.evaluate(module, trainer.eval_images)
                        _show(stage, module, run_log, step)
                    evaluated = True
                    if is_main:
                        run_log.scalars(step, {f"val/{name}": value for name, value in figures.items()})
                    if figures["objective"] < best:
                        best = figures["objective"]
                        collectives.on_main(partial(checkpoints.mark_best, step, figures))
                    speed.restart()
                if step == trainer.steps:
                    break
                step += 1
                factor, last = warmup_cosine(step, trainer.steps, trainer.warmup_steps), step == trainer.steps
                stop = _train_step(
                    step, factor, stage, seats, machine, schedule, batches, trainer.clip_grad_norm or math.inf,
                    meter, health, speed, interruption,
                )  # fmt: skip
                average.update(seats[0].trained, step)
                if step % trainer.log_every == 0 or last:
                    values = meter.flush()
                    health.check(run, seats, schedule, checkpoints)
                    rates = speed.figures(values.pop("tokens_per_image", None))
                    if "padding_share" in values:
                        rates["speed/padding_share"] = values.pop("padding_share")
                    if is_main:
                        rates["train/learning_rate"] = seats[0].base_rates[0] * factor
                        if skipped := getattr(stage.dataset, "skipped", 0):
                            rates["data/skipped_images"] = skipped
                        run_log.scalars(step, {f"train/{name}": value for name, value in values.items()} | rates)
                    bar.set_postfix(
                        loss=f"{values['loss']:.4f}", images_per_s=f"{rates['speed/images_per_second']:.0f}",
                        refresh=False,
                    )  # fmt: skip
                bar.update()
                evaluated = not (step % trainer.eval_every == 0 or last)
                if step % trainer.checkpoint_every == 0 or not evaluated or stop:
                    save()
                if stop:
                    name = interruption.signal.name if interruption.signal else "a signal to another process"
                    raise Stopped(f"stopped by {name} after step {step}, state saved: the same command goes on")
        with average.in_use(seats[0].trained) as module:
            if trainer.export == "best" and checkpoints.best.get("step", step) != step:
                figures = _load_best(checkpoints, stage.players[0].name, module)
                _show(stage, module, run_log)  # files show what is exported
        return module.eval(), figures
    finally:
        bar.close()
        batches.close()
        if is_main:
            run_log.close()


def _load_best(checkpoints: Checkpoints, name: str, module: nn.Module) -> dict[str, float]:
    """Load the weights of the best evaluation, and give its figures."""
    step = checkpoints.best["step"]
    state = read_state(checkpoints.path(step), torch.device("cpu"))
    module.load_state_dict(state["players"][name]["module"] if state["average"] is None else state["average"])
    log.info("the weights of step %d are exported, whose evaluation was the best", step)
    return checkpoints.best["metrics"]


def _show(stage: Stage, module: nn.Module, run_log: RunLog | None, step: int | None = None) -> None:
    """Log a stage's pictures, if images go anywhere; without a step, as files alone. The main process has the log."""
    if run_log is not None and run_log.shows_images:
        for name, picture in stage.pictures(module).items():
            run_log.image(step, name, picture)


def _train_step(
    step: int, factor: float, stage: Stage, seats: list[_Seat], machine: Machine, schedule: Schedule, batches: Any,
    limit: float, meter: Meter, health: _Health, speed: _Speed, interruption: Interruption,
) -> bool:  # fmt: skip
    """One optimizer step of every player; gives whether some process was asked to stop."""
    device, parts = machine.device, schedule.micro_batches
    seats = [seat for seat in seats if seat.player.plays(step)]
    for seat in seats:
        seat.wrapped.train()
        for group, rate in zip(seat.optimizer.param_groups, seat.base_rates, strict=True):
            group["lr"] = rate * factor
    micro_batches = []
    for part in range(parts):
        with speed.waiting():
            batch = next(batches)
        places = schedule.places(step, part)
        rng = SampleRng(schedule.seed, torch.arange(places.start, places.stop, device=device))
        micro_batches.append((stage.prepare(batch.to(device), rng), Step(step, rng)))
    stop = torch.full((1,), float(interruption.signal is not None), dtype=torch.float64, device=device)
    counts: list[dict[str, Tensor] | None] = [None] * len(seats)
    if parts > 1:
        counts, agreed = _global_counts([[s.player.counts(batch) for batch, _ in micro_batches] for s in seats], stop)
        vote = _Vote(agreed)
    totals: dict[str, Tensor] = {}
    for part, (batch, details) in enumerate(micro_batches):
        # dropout: other numbers for every micro-batch, whichever process it comes to
        machine.seed(((schedule.seed << 40) + schedule.places(step, part).start) % (1 << 63))
        for index, seat in enumerate(seats):
            with machine.no_sync(seat.wrapped, part == parts - 1):
                with machine.accelerator.autocast():
                    terms = seat.player.terms(seat.wrapped, batch, details)
                if parts == 1 and collectives.count() > 1:  # the terms themselves tell
                    own = {name: term.count for name, term in terms.items() if not term.is_reported_only}
                    (counts[index],), agreed = _global_counts([[own]], stop)
                    vote = _Vote(agreed)
                loss = weighted_sum(terms, counts[index])
                # gradients are averaged over the processes, but these losses are parts of one sum
                machine.accelerator.backward(loss * collectives.count())
            meter.add(terms)
            meter.add_histograms(seat.player.histograms())
            for name, term in terms.items():
                totals[name] = totals.get(name, 0) + term.total.detach().double()
            if index == 0:
                totals["loss"] = totals.get("loss", 0) + loss.detach().double()
    meter.add({"loss": Term(totals["loss"] * collectives.count(), 1)})
    for seat in seats:
        norm = machine.clip_gradients(seat.wrapped, limit).detach()
        seat.optimizer.step()
        seat.optimizer.zero_grad()
        seat.player.update(seat.trained)
        if not seat.optimizer.step_was_skipped:  # a loss scale that was too high: it is lowered, nothing is amiss
            name = "gradient_norm" if seat.player is stage.players[0] else f"gradient_norm_{seat.player.name}"
            meter.add({name: Term(norm, 1)})
            totals[name] = norm.double()
    health.add(step, totals)
    speed.step()
    return vote.result() if collectives.count() > 1 else interruption.signal is not None


def _global_counts(
    counts: list[list[Mapping[str, Tensor | float]]], stop: Tensor
) -> tuple[list[dict[str, Tensor]], Tensor]:
    """Counts of all micro-batches (inner list) of all processes, for each player; and whether any wants to stop."""
    names = [list(micro_batches[0]) for micro_batches in counts]
    flat = [
        sum(as_count(part[name], stop) for part in micro_batches)
        for micro_batches, own in zip(counts, names, strict=True)
        for name in own
    ]
    joined = collectives.sum_(torch.cat([stop, torch.stack(flat)]))
    numbers = iter(joined[1:].unbind())
    return [{name: next(numbers) for name in own} for own in names], joined[:1]


def _schedule(stage: Stage, machine: Machine, trainer: TrainerConfig, seed: int) -> Schedule:
    parts = collectives.count() * machine.hardware.gradient_accumulation
    if trainer.batch_size % parts:
        raise GraincodeError(
            f"trainer.batch_size={trainer.batch_size} is not divisible by {collectives.count()} processes x "
            f"{machine.hardware.gradient_accumulation} micro-batches: "
            f"type trainer.batch_size={-(-trainer.batch_size // parts) * parts}"
        )
    return Schedule(
        len(stage.dataset), trainer.batch_size, seed, collectives.rank(), collectives.count(),
        machine.hardware.gradient_accumulation, stage.windows,
    )  # fmt: skip


def _find_state(checkpoints: Checkpoints, trainer: TrainerConfig, run: Run) -> dict[str, Any] | None:
    """The state to go on from, the same on all processes, or None to begin at step 1."""
    if trainer.resume == "never" and checkpoints.steps():
        raise GraincodeError(
            f"trainer.resume=never, but {checkpoints.folder} has states up to step {checkpoints.steps()[0]}: "
            "type another run_name, or trainer.resume=auto"
        )
    state = checkpoints.load(torch.device("cpu"))
    if state is None and trainer.resume not in ("auto", "never"):
        path = Path(trainer.resume)
        differing = run.differing(read_about(path)["identity"], but=("trainer.steps", "inputs.resume"))
        if differing:
            raise GraincodeError(
                f"trainer.resume={path} is of a run with other settings ({differing}): type the settings of that run; "
                "only trainer.steps may differ"
            )
        state = read_state(path, torch.device("cpu")) | {"best": math.inf}
        # as its own, so that its evaluation can be the best
        collectives.on_main(lambda: checkpoints.save(state["step"], state, identity=run.identity))
    found = 0 if state is None else state["step"]
    collectives.check_agreement("the step to go on from", found)
    collectives.on_main(lambda: checkpoints.set_aside_after(found))
    return state


def _seat(player: Player, machine: Machine, make_optimizer: Callable[..., torch.optim.Optimizer]) -> _Seat:
    wrapped, optimizer = machine.prepare(player.module, lambda module: make_optimizer(parameter_groups(module)))
    return _Seat(player, wrapped, optimizer, [group["lr"] for group in optimizer.param_groups])


def _training_flops(stage: Stage, machine: Machine, schedule: Schedule) -> float:
    """FLOPs of the first player's training on one item, counted on four, of any length."""
    player, items = stage.players[0], range(min(4, schedule.batch_size))
    batch, step = (
        stage.dataset[schedule.stream(items)],
        Step(0, SampleRng(0, torch.arange(len(items), device=machine.device))),
    )
    player.module.eval()
    with FlopCounterMode(display=False) as counter:
        loss = weighted_sum(player.terms(player.module, batch.to(machine.device), step))
        torch.autograd.grad(loss, list(player.module.parameters()), allow_unused=True)
    return counter.get_total_flops() / len(items)


def parameter_groups(module: nn.Module) -> list[dict[str, Any]]:
    """Parameters in two groups: those that weight decay may shrink, and norms, biases and embeddings."""
    decayed = {
        id(part.weight) for part in module.modules() if isinstance(part, nn.Linear | nn.Conv2d) and part.weight.ndim > 1
    }
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    return [
        {"params": [p for p in parameters if id(p) in decayed]},
        {"params": [p for p in parameters if id(p) not in decayed], "weight_decay": 0.0},
    ]
