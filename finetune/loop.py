"""The optimisation loop: planned rows -> losses -> steps, the same for every method and number of processes."""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate import Accelerator
from hydra.utils import instantiate
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from finetune.data.batches import Batch, Example, pack, supervised
from finetune.feeder import Feeder, attending_rows, summed_loss
from finetune.graphs import Graphs, Shapes, Size, compiled, way
from finetune.memory import free, out_of_memory, too_much
from finetune.methods.blocks import blocks
from finetune.methods.method import Method, trainable
from finetune.models.attention import packing
from finetune.noise import noisy
from finetune.resume import Keeper, Line, Moving
from finetune.schedule import Clock, schedule_factor, spaced

log = logging.getLogger("finetune")

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
    skipped: bool = False

    def numbers(self) -> tuple[float, float]:
        """Mean loss and gradient norm."""
        return float(self.summed) / self.count, float(self.norm)

    def broken(self) -> Tensor:
        """1.0 if one of them is no number, else 0.0."""
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

    def run(
        self,
        model: Any,
        *,
        validate: Callable[[Any], float],
        record: Callable[[Line], None],
        keeper: Keeper | None = None,
    ) -> Any:
        """Train; `record` gets every step's numbers, `keeper` what resuming needs. Returns the unwrapped model."""
        prepared, optimizer = self.accelerator.prepare(model, self._optimizer(model))
        with self.method.training(model):
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
        loop, clock, broken = self._as_after(history), Clock(history), _broken_at_the_end(history)
        graphs = loop._graphs(base, weights)
        late = graphs is not None and self._guarded(optimizer)
        waiting: _Done | None = None

        def finish(done: _Done) -> None:
            """Read a step's numbers, which waits for the device."""
            nonlocal broken
            loss, norm = done.numbers()
            finite = math.isfinite(loss) and (self.accelerator.scaler is not None or math.isfinite(norm))
            clock.add(sum(len(self.examples[row].ids) for row in done.rows))
            line: Line = {"step": done.number, "num_steps": len(self.steps), "loss": loss if finite else None}
            line |= {"lr": done.rate, "gradient_norm": norm, "tokens_per_second": clock.rate()}
            line |= {"seconds": clock.seconds, "num_tokens": clock.num_tokens, "way": graphs.way if graphs else "eager"}
            line |= {**({"skipped": True} if done.skipped or not finite else {}), **loop._limit()}
            if done.number in validations:
                with clock.paused():
                    line["valid_loss"] = validate(model)
            record(line)
            broken = 0 if finite else broken + 1
            if broken == MOST_SKIPPED:
                raise self._not_a_number(done.number, done.rows, loss=loss, norm=norm, lr=done.rate)

        for number, rows in list(enumerate(self.steps, start=1))[len(history) :]:
            rate = float(schedule.get_last_lr()[0])
            loop, summed, count = loop._fitting(model, base, rows, optimizer, graphs)
            norm = self.accelerator.clip_grad_norm_(weights, self.optim["max_grad_norm"] or math.inf)
            done = _Done(number, rows, rate, count, self.accelerator.reduce(summed), norm)
            if late:
                optimizer.optimizer.found_inf = done.broken()  # the fused kernel then leaves the weights alone
                optimizer.step()
            else:
                done.skipped = self._step(optimizer, weights, done)
            self.method.after_step(base, number)
            if graphs:
                graphs.zero()
            else:
                optimizer.zero_grad()
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

    def _gradients(self, model: Any, base: Any, rows: Sequence[int], graphs: Graphs | None) -> tuple[Tensor, int]:
        """Gradients of the step's mean loss per supervised token; this process's summed loss, and the step's tokens."""
        rank, ranks = self.accelerator.process_index, self.accelerator.num_processes
        count = sum(len(supervised(self.examples[row], loss_on=self.feeder.loss_on)) for row in rows)
        summed = torch.zeros((), device=self.accelerator.device)
        if graphs:
            for part in self._packs(rows):
                summed += graphs(pack(part, loss_on=self.feeder.loss_on), scale=1 / count)
            if isinstance(penalty := self.method.penalty(base), Tensor):
                penalty.backward()
            return summed, count
        batches = self._share(rows[rank::ranks])
        for batch in batches:
            last = batch is batches[-1]
            alone = contextlib.nullcontext() if last else self.accelerator.no_sync(model)
            with alone, attending_rows(base, self.feeder):
                with noisy(base, batch, alpha=self.optim.get("neftune_alpha")):
                    loss = summed_loss(model, batch)
                summed += loss.detach()
                penalty = self.method.penalty(base) if last else 0.0
                self.accelerator.backward(loss * (ranks / count) + penalty)
        return summed, count

    def _fitting(
        self, model: Any, base: Any, rows: Sequence[int], optimizer: Any, graphs: Graphs | None
    ) -> tuple[Loop, Tensor, int]:
        """`_gradients`, with batches halved until they fit into memory; and the loop that goes on with such batches."""
        loop, device, drawn = self, self.accelerator.device, torch.get_rng_state()
        drawn_there = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        while True:
            try:
                return loop, *loop._gradients(model, base, rows, graphs)
            except RuntimeError as error:
                # Of several processes only one may run out, and the others wait for its gradients.
                if not out_of_memory(error) or self.accelerator.num_processes > 1 or graphs:
                    raise
                said = str(error)
            optimizer.zero_grad()
            free()
            loop = loop._halved(rows, said=said)
            torch.set_rng_state(drawn)
            if drawn_there is not None:
                torch.cuda.set_rng_state(drawn_there, device)

    def _halved(self, rows: Sequence[int], *, said: str) -> Loop:
        """The loop with batches half as large as this step's largest; raises when every row is alone already."""
        sizes = [(_num_rows(batch), batch.ids.numel()) for batch in self._share(rows)]
        largest = max((size for num_rows, size in sizes if num_rows > 1), default=0)
        if not largest:
            raise too_much(max(size for _, size in sizes), doing="training:", said=said)
        log.warning("out of memory: batches of several rows have at most %d tokens from now on", largest // 2)
        return self._bounded(largest // 2, halvings=self.feeder.halvings + 1)

    def _bounded(self, max_tokens: int, *, halvings: int) -> Loop:
        return replace(self, feeder=replace(self.feeder, max_tokens=max_tokens, halvings=halvings))

    def _as_after(self, history: Sequence[Line]) -> Loop:
        """The loop with batches as small as they became in the steps that are done."""
        if not history or "micro_batch_tokens" not in history[-1]:
            return self
        return self._bounded(history[-1]["micro_batch_tokens"], halvings=history[-1]["micro_batch_halvings"])

    def _limit(self) -> dict[str, int | None]:
        """What a line of steps.jsonl says of it."""
        feeder = self.feeder
        if not feeder.halvings:
            return {}
        return {"micro_batch_tokens": feeder.max_tokens, "micro_batch_halvings": feeder.halvings}

    def _step(self, optimizer: Any, weights: Sequence[nn.Parameter], done: _Done) -> bool:
        """Move the weights, unless loss or gradient are no numbers: was the step skipped?

        Under float16 a gradient may overflow, and its scaler skips the step.
        """
        loss, norm = done.numbers()
        scaled = self.accelerator.scaler is not None
        finite = math.isfinite(loss) and (scaled or math.isfinite(norm))
        if finite or scaled:
            optimizer.step()
        # Where a gradient overflowed a fused optimizer leaves the weights alone by itself, which Accelerate misses.
        skipped = not (finite and math.isfinite(norm)) or bool(optimizer.step_was_skipped)
        if skipped:
            for weight in weights:
                if weight.grad is not None:
                    weight.grad.zero_()  # AdaLoRA averages gradients after each step
        return skipped

    def _guarded(self, optimizer: Any) -> bool:
        """Can the device itself leave out a step that is no number, so that nobody waits for it?"""
        fused = optimizer.optimizer.defaults.get("fused") is True
        return fused and type(self.method).after_step is Method.after_step

    def _not_a_number(self, step: int, rows: Sequence[int], *, loss: float, norm: float, lr: float) -> Exception:
        names = ", ".join(str(self.ids[row]) if self.ids else str(row) for row in rows[:8])
        return FloatingPointError(
            f"step {step}: loss {loss}, gradient norm {norm}, learning rate {lr:g}, rows {names}; steps "
            f"{step - MOST_SKIPPED + 1} to {step} were skipped for this: a smaller optim.lr or another model.precision "
            "may help"
        )

    def _graphs(self, base: Any, weights: Sequence[nn.Parameter]) -> Graphs | None:
        """The plan's packs as graphs, where the device has them and the run earns them back."""
        device = self.accelerator.device
        # float32 has no attention by row bounds, float16's loss is scaled, NEFTune's noise is a hook.
        able = device.type == "cuda" and self.feeder.packed and self.accelerator.mixed_precision == "bf16"
        able &= "graph" in self.method.replayable and not self.optim.get("neftune_alpha")
        if not able or self.accelerator.num_processes > 1:
            if self.way in ("graph", "compiled"):
                log.warning("launch.step=%s is not for this method, device, precision or base: eager steps", self.way)
            return None
        parts = [part for rows in self.steps for part in self._packs(rows)]
        shapes = Shapes.of([self._size(part) for part in parts], longest=max(len(e.ids) for p in parts for e in p))
        layers = blocks(base.get_base_model() if hasattr(base, "get_base_model") else base)
        how = way(self.way, num_packs=len(parts), num_buckets=len(shapes.rooms), num_layers=len(layers))
        if how == "compiled" and "compiled" not in self.method.replayable:
            how = "graph"
        if how == "eager":
            return None

        def loss(batch: Batch) -> Tensor:
            with torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
                return summed_loss(base, batch)

        began = time.perf_counter()
        graphs = Graphs(shapes, way=how, loss=loss, weights=weights, device=device)
        try:
            faster = compiled(layers, base.get_input_embeddings()) if how == "compiled" else contextlib.nullcontext()
            with packing(base), faster:
                graphs.capture()
        except RuntimeError as error:  # nothing of CUDA can be relied on after a capture that was cut off
            raise RuntimeError(
                f"a step cannot be recorded as a CUDA graph (launch.step=eager needs none): {error}"
            ) from error
        seconds = time.perf_counter() - began
        log.info("%d CUDA graphs (%s) in %.1f s", len(shapes.rooms), how, seconds)
        return graphs

    def _packs(self, rows: Sequence[int]) -> list[list[Example]]:
        """The step's rows as packs."""
        parts = self.optim["accumulation"]
        return [p for i in range(parts) for p in self.feeder.packs([self.examples[row] for row in rows[i::parts]])]

    def _size(self, part: Sequence[Example]) -> Size:
        kept = sum(len(supervised(example, loss_on=self.feeder.loss_on)) for example in part)
        return Size(sum(len(example.ids) for example in part), len(part), kept)

    def _share(self, rows: Sequence[int]) -> list[Batch]:
        """This process's batches, at least one for each micro-batch."""
        parts = self.optim["accumulation"]
        return [b for i in range(parts) for b in self.feeder.batches([self.examples[row] for row in rows[i::parts]])]


def _num_rows(batch: Batch) -> int:
    return len(batch.ids) if batch.bounds is None else len(batch.bounds) - 1


def _broken_at_the_end(history: Sequence[Line]) -> int:
    """Steps in a row, the last included, whose loss or gradient was no number."""
    lines = itertools.takewhile(lambda line: line["loss"] is None, reversed(history))
    return sum(1 for _ in lines)
