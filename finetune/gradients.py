"""What one step's gradients are: its rows as batches, halved where memory runs out, or replayed as CUDA graphs."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from finetune.data.batches import Batch, Example, pack, supervised
from finetune.feeder import Feeder, attending_rows, summed_loss
from finetune.graphs import Graphs, Shapes, Size, Work, compiled, quickest
from finetune.memory import free, out_of_memory, too_much
from finetune.methods.blocks import blocks
from finetune.methods.method import Method
from finetune.models.attention import NAME, attending
from finetune.models.fastest import fastest
from finetune.models.shape import Shape
from finetune.noise import noisy
from finetune.resume import Line

log = logging.getLogger("finetune")


@dataclass(frozen=True)
class Gradients:
    """How a training finds the gradients of its steps."""

    model: Any  # as Accelerate prepared it
    base: Any  # as the method attached it
    method: Method
    accelerator: Accelerator
    feeder: Feeder
    examples: Sequence[Example]
    optim: Mapping[str, Any]
    graphs: Graphs | None = None
    begun: str | None = None  # how the steps were computed that are done

    @property
    def way(self) -> str:
        """How steps are computed: eager, graph or compiled."""
        return self.graphs.way if self.graphs else "eager"

    def of(self, rows: Sequence[int], optimizer: Any) -> tuple[Gradients, Tensor, int]:
        """Add the gradients of the step's mean loss per supervised token.

        How the next ones are found, with batches halved until these fitted into memory; this process's summed loss; and
        the step's supervised tokens.
        """
        # Of several processes only one may run out, and the others wait for its gradients; graphs fitted when recorded.
        if self.accelerator.num_processes > 1 or self.graphs:
            return self, *self._added(rows)
        found, device, drawn = self, self.accelerator.device, torch.get_rng_state()
        drawn_there = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        while True:
            try:
                return found, *found._added(rows)
            except RuntimeError as error:
                if not out_of_memory(error):
                    raise
                said = str(error)
            optimizer.zero_grad()
            free()
            found = found._halved(rows, said=said)
            torch.set_rng_state(drawn)
            if drawn_there is not None:
                torch.cuda.set_rng_state(drawn_there, device)

    def zero(self, optimizer: Any) -> None:
        """Forget the gradients."""
        if self.graphs:
            self.graphs.zero()
        else:
            optimizer.zero_grad()

    def as_after(self, history: Sequence[Line]) -> Gradients:
        """As the steps that are done: by graphs or not, and with batches as small as they became."""
        if not history:
            return self
        last, found = history[-1], replace(self, begun=history[-1].get("way"))
        if "micro_batch_tokens" not in last:
            return found
        return found._bounded(last["micro_batch_tokens"], halvings=last["micro_batch_halvings"])

    def limit(self) -> dict[str, int | None]:
        """What a line of steps.jsonl says of it."""
        feeder = self.feeder
        if not feeder.halvings:
            return {}
        return {"micro_batch_tokens": feeder.max_tokens, "micro_batch_halvings": feeder.halvings}

    def recorded(
        self, steps: Sequence[Sequence[int]], weights: Sequence[nn.Parameter], *, asked: str, alike: int
    ) -> Gradients:
        """With the packs of all `steps` as graphs, where the device has them and the run earns them back.

        So many runs `alike` earn back their compiled layers together.
        """
        if why := self._unrecordable():
            if (wanted := self.begun if asked == "auto" else asked) in ("graph", "compiled"):
                log.warning("steps are eager and not %s (launch.step=%s), as %s", wanted, asked, why)
            return self
        parts = [part for rows in steps for part in self._packs(rows)]
        sizes = [self._size(part) for part in parts]
        shapes = Shapes.of(sizes, longest=max(len(e.ids) for p in parts for e in p))
        if (how := self._how(asked, sizes, shapes, alike=alike)) == "eager":
            return self
        began = time.perf_counter()
        graphs = Graphs(shapes, way=how, loss=self._loss, weights=weights, device=self.accelerator.device)
        try:
            attention = self._captured(graphs)
        except RuntimeError as error:
            if asked != "auto" or graphs.recording or not out_of_memory(error):
                raise RuntimeError(
                    f"a step cannot be recorded as a CUDA graph (launch.step=eager needs none): {error}"
                ) from error
            log.warning("no memory to record steps, so they are eager, which may have smaller batches: %s", error)
        else:
            words = "%d CUDA graphs (%s, %s attention) in %.1f s"
            log.info(words, len(shapes.rooms), how, attention, time.perf_counter() - began)
            return replace(self, graphs=graphs)
        graphs.abandon()
        del graphs
        free()
        return self

    def _how(self, asked: str, sizes: Sequence[Size], shapes: Shapes, *, alike: int) -> str:
        """Eager, graph or compiled: as asked, as the steps that are done, or as takes the fewest seconds."""
        compilable = "compiled" in self.method.replayable
        how = self.begun if asked == "auto" else asked
        if how is None:
            return quickest(self._work(sizes, shapes), compilable=compilable, alike=alike)
        if how == "compiled" and not compilable:
            words = "graphs of layers as they are and not compiled (launch.step=%s), as this method's are not compiled"
            log.warning(words, asked)
            return "graph"
        return how

    def _work(self, sizes: Sequence[Size], shapes: Shapes) -> Work:
        network = self._network()
        per_token = Shape.of(network.config).bytes_per_token(number_bytes=2, checkpointed=False)
        num_bytes = per_token * sum(size.tokens for size in sizes)
        return Work(len(sizes), len(shapes.rooms), len(blocks(network)), num_bytes)

    def _captured(self, graphs: Graphs) -> str:
        """Record them; the name of their attention."""
        attention, embeddings = self._attention(graphs.way, graphs.shapes), self.base.get_input_embeddings()
        layers = blocks(self._network())
        compiling = compiled(layers, embeddings) if graphs.way == "compiled" else contextlib.nullcontext()
        with attending(self.base, attention), compiling:
            graphs.capture()
        return attention

    def _attention(self, how: str, shapes: Shapes) -> str:
        """Its name; a run so long that its layers are compiled also earns back an attention that is."""
        rows = [room.rows for room in shapes.rooms.values()]
        return fastest(self.base, longest=shapes.longest, rows=rows) if how == "compiled" else NAME

    def _added(self, rows: Sequence[int]) -> tuple[Tensor, int]:
        count = sum(len(supervised(self.examples[row], loss_on=self.feeder.loss_on)) for row in rows)
        return (self._replayed(rows, count) if self.graphs else self._eager(rows, count)), count

    def _replayed(self, rows: Sequence[int], count: int) -> Tensor:
        assert self.graphs
        summed = torch.zeros((), device=self.accelerator.device)
        for part in self._packs(rows):
            summed += self.graphs(pack(part, loss_on=self.feeder.loss_on), scale=1 / count)
        if isinstance(penalty := self.method.penalty(self.base), Tensor):
            penalty.backward()
        return summed

    def _eager(self, rows: Sequence[int], count: int) -> Tensor:
        rank, ranks = self.accelerator.process_index, self.accelerator.num_processes
        summed = torch.zeros((), device=self.accelerator.device)
        batches = self._batches(rows[rank::ranks])
        for batch in batches:
            last = batch is batches[-1]
            alone = contextlib.nullcontext() if last else self.accelerator.no_sync(self.model)
            with alone, attending_rows(self.base, self.feeder):
                with noisy(self.base, batch, alpha=self.optim.get("neftune_alpha")):
                    loss = summed_loss(self.model, batch)
                summed += loss.detach()
                penalty = self.method.penalty(self.base) if last else 0.0
                self.accelerator.backward(loss * (ranks / count) + penalty)
        return summed

    def _loss(self, batch: Batch) -> Tensor:
        """What a graph records."""
        with torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
            return summed_loss(self.base, batch)

    def _unrecordable(self) -> str:
        """Why steps cannot be recorded; empty if they can.

        float32 has no attention by row bounds, float16's loss is scaled, and noise is drawn in a hook.
        """
        found = {
            "there is no GPU": self.accelerator.device.type != "cuda",
            "the precision is not bfloat16": self.accelerator.mixed_precision != "bf16",
            "several processes share a step": self.accelerator.num_processes > 1,
            "rows are padded": not self.feeder.packed,
            "this method's are not recorded": "graph" not in self.method.replayable,
            "optim.neftune_alpha draws noise": bool(self.optim.get("neftune_alpha")),
            "int8 looks for outliers, which the host must see": getattr(self._network(), "is_loaded_in_8bit", False),
        }
        return next((why for why, holds in found.items() if holds), "")

    def _network(self) -> Any:
        """The model of transformers."""
        return self.base.get_base_model() if hasattr(self.base, "get_base_model") else self.base

    def _halved(self, rows: Sequence[int], *, said: str) -> Gradients:
        """With batches half as large as this step's largest; raises when every row is alone already."""
        sizes = [(_num_rows(batch), batch.ids.numel()) for batch in self._batches(rows)]
        largest = max((size for num_rows, size in sizes if num_rows > 1), default=0)
        if not largest:
            raise too_much(max(size for _, size in sizes), doing="training:", said=said)
        log.warning("out of memory: batches of several rows have at most %d tokens from now on", largest // 2)
        return self._bounded(largest // 2, halvings=self.feeder.halvings + 1)

    def _bounded(self, max_tokens: int, *, halvings: int) -> Gradients:
        return replace(self, feeder=replace(self.feeder, max_tokens=max_tokens, halvings=halvings))

    def _batches(self, rows: Sequence[int]) -> list[Batch]:
        """The rows as batches, at least one for each micro-batch."""
        return [found for part in self._micro_batches(rows) for found in self.feeder.batches(part)]

    def _packs(self, rows: Sequence[int]) -> list[list[Example]]:
        """The rows as packs."""
        return [found for part in self._micro_batches(rows) for found in self.feeder.packs(part)]

    def _micro_batches(self, rows: Sequence[int]) -> list[list[Example]]:
        parts = self.optim["accumulation"]
        return [[self.examples[row] for row in rows[i::parts]] for i in range(parts)]

    def _size(self, part: Sequence[Example]) -> Size:
        kept = sum(len(supervised(example, loss_on=self.feeder.loss_on)) for example in part)
        return Size(sum(len(example.ids) for example in part), len(part), kept)


def _num_rows(batch: Batch) -> int:
    return len(batch.ids) if batch.bounds is None else len(batch.bounds) - 1
