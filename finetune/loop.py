"""The optimisation loop: planned rows -> gradients -> steps, the same for every method and number of processes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from accelerate import Accelerator
from hydra.utils import instantiate
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from finetune.data.batches import Example
from finetune.feeder import Feeder
from finetune.gradients import Gradients
from finetune.methods.method import Method, trainable
from finetune.models.fused import fused
from finetune.resume import Keeper, Line, Moving
from finetune.schedule import Clock, schedule_factor, spaced

MOST_SKIPPED = 3  # steps in a row whose loss or gradient is no number


@dataclass
class _Done:
    """A step that was started; its numbers may still lie on the device."""

    number: int
    rows: Sequence[int]
    rate: float
    count: int  # supervised tokens
    summed: Tensor  # loss
    norm: Tensor | float  # of the gradient
    scaled: bool  # under float16, whose gradients may overflow
    skipped: bool = False

    @cached_property
    def numbers(self) -> tuple[float, float]:
        """Mean loss and gradient norm, which waits for the device."""
        return float(self.summed) / self.count, float(self.norm)

    @property
    def finite(self) -> bool:
        """Are they numbers, but for an overflow?"""
        loss, norm = self.numbers
        return math.isfinite(loss) and (self.scaled or math.isfinite(norm))

    def broken(self) -> Tensor:
        """1.0 if one of them is no number, else 0.0; on the device."""
        return 1.0 - (self.summed.isfinite() & torch.as_tensor(self.norm, device=self.summed.device).isfinite()).float()


@dataclass(frozen=True)
class Loop:
    """What one training needs besides the model."""

    method: Method
    accelerator: Accelerator
    feeder: Feeder
    examples: Sequence[Example]
    steps: Sequence[Sequence[int]]  # row numbers of every optimizer step
    optim: Mapping[str, Any]
    lr: float
    ids: Sequence[str] = ()  # names of the examples, for messages
    way: str = "auto"  # auto | eager | graph | compiled: see finetune.graphs
    alike: int = 1  # runs that are compiled to the same code

    def run(
        self,
        model: Any,
        *,
        validate: Callable[[Any], float],
        record: Callable[[Line], None],
        keeper: Keeper | None = None,
    ) -> Any:
        """Train; `record` gets every step's numbers, `keeper` what resuming needs. Returns the unwrapped model."""
        with fused(model), self.method.lean(model):
            prepared, optimizer = self.accelerator.prepare(model, self._optimizer(model))
            self._run(prepared, model, optimizer, validate=validate, record=record, keeper=keeper)
        return model

    def _run(
        self,
        model: Any,
        base: Any,
        optimizer: Any,
        *,
        validate: Callable[[Any], float],
        record: Callable[[Line], None],
        keeper: Keeper | None,
    ) -> None:
        weights = list(trainable(base))  # walking the modules costs as much as a small layer
        schedule = LambdaLR(optimizer, lambda step: schedule_factor(step, len(self.steps), self.optim))
        validations = spaced(self.optim["validations"], len(self.steps))
        model.train()
        moving = Moving(base, self.method, optimizer, schedule, self.accelerator.scaler)
        history = keeper.resume(moving) if keeper else []
        clock, broken = Clock(history), _broken_at_the_end(history)
        gradients = Gradients(model, base, self.method, self.accelerator, self.feeder, self.examples, self.optim)
        gradients = gradients.as_after(history)
        if len(history) < len(self.steps):
            gradients = gradients.recorded(self.steps, weights, asked=self.way, alike=self.alike)
        late = gradients.graphs is not None and self._guarded(optimizer)
        waiting: _Done | None = None

        def finish(done: _Done) -> None:
            """Read a step's numbers and record them."""
            nonlocal broken
            finite = done.finite  # waits for the device: the clock is read after it
            clock.add(sum(len(self.examples[row].ids) for row in done.rows))
            line = self._line(done, clock, gradients)
            if done.number in validations:
                with clock.paused():
                    line["valid_loss"] = validate(model)
            record(line)
            broken = 0 if finite else broken + 1
            if broken == MOST_SKIPPED:
                raise self._not_a_number(done)

        for number, rows in list(enumerate(self.steps, start=1))[len(history) :]:
            rate = float(schedule.get_last_lr()[0])
            gradients, summed, count = gradients.of(rows, optimizer)
            norm = self.accelerator.clip_grad_norm_(weights, self.optim["max_grad_norm"] or math.inf)
            summed, scaled = self.accelerator.reduce(summed), self.accelerator.scaler is not None
            done = _Done(number, rows, rate, count, summed, norm, scaled)
            _move(optimizer, weights, done, late=late)
            self.method.after_step(base, number)
            gradients.zero(optimizer)
            schedule.step()
            if waiting:
                finish(waiting)
            waiting = done
            if not late or number in validations or number == len(self.steps) or (keeper and keeper.due()):
                finish(waiting)
                waiting = None
                if keeper:
                    with clock.paused():
                        keeper.after(number, moving)
        self._leave(weights)

    def _line(self, done: _Done, clock: Clock, gradients: Gradients) -> Line:
        """Of steps.jsonl."""
        loss, norm = done.numbers
        line: Line = {"step": done.number, "num_steps": len(self.steps), "loss": loss if done.finite else None}
        line |= {"lr": done.rate, "gradient_norm": norm, "tokens_per_second": clock.rate()}
        line |= {"seconds": clock.seconds, "num_tokens": clock.num_tokens, "way": gradients.way}
        return line | ({"skipped": True} if done.skipped or not done.finite else {}) | gradients.limit()

    def _leave(self, weights: Sequence[nn.Parameter]) -> None:
        """Give gradients and the optimizer's memory back: answers need none."""
        for weight in weights:
            weight.grad = None
        self.accelerator.free_memory()

    def _optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        arguments = {k: v for k, v in self.optim["optimizer"].items() if k != "_target_"}
        groups = self.method.parameter_groups(model, self.lr)
        target = self.optim["optimizer"]["_target_"]
        if target == "torch.optim.AdamW" and not arguments.keys() & {"foreach", "differentiable"}:
            arguments = {"fused": True, **arguments}
        optimizer: torch.optim.Optimizer = instantiate({"_target_": target, "_partial_": True})(groups, **arguments)
        return optimizer

    def _guarded(self, optimizer: Any) -> bool:
        """Can the device itself leave out a step that is no number, so that nobody waits for it?"""
        fused = optimizer.optimizer.defaults.get("fused") is True
        return fused and type(self.method).after_step is Method.after_step

    def _not_a_number(self, done: _Done) -> Exception:
        (loss, norm), step = done.numbers, done.number
        names = ", ".join(str(self.ids[row]) if self.ids else str(row) for row in done.rows[:8])
        return FloatingPointError(
            f"step {step}: loss {loss}, gradient norm {norm}, learning rate {done.rate:g}, rows {names}; steps "
            f"{step - MOST_SKIPPED + 1} to {step} were skipped for this: a smaller optim.lr or another model.precision "
            "may help"
        )


def _move(optimizer: Any, weights: Sequence[nn.Parameter], done: _Done, *, late: bool) -> None:
    """Move the weights, unless loss or gradient are no numbers, which is `late` known to the device alone.

    Under float16 a gradient may overflow, and its scaler skips the step.
    """
    if late:
        optimizer.optimizer.found_inf = done.broken()  # the fused kernel then leaves the weights alone
        optimizer.step()
        return
    if done.finite or done.scaled:
        optimizer.step()
    # Where a gradient overflowed a fused optimizer leaves the weights alone by itself, which Accelerate misses.
    done.skipped = not (done.finite and math.isfinite(done.numbers[1])) or bool(optimizer.step_was_skipped)
    if done.skipped:
        for weight in weights:
            if weight.grad is not None:
                weight.grad.zero_()  # AdaLoRA averages gradients after each step


def _broken_at_the_end(history: Sequence[Line]) -> int:
    """Steps in a row, the last included, whose loss or gradient was no number."""
    lines = itertools.takewhile(lambda line: line["loss"] is None, reversed(history))
    return sum(1 for _ in lines)
