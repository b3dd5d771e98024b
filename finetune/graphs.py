"""Losses and gradients of packs on a GPU without the host: static shapes, compiled layers, one CUDA graph per bucket.

Below some 16 k tokens a step of a small base waits for the host, which launches thousands of small kernels. Packs are
therefore filled up to a few sizes known from the plan, and what runs on each is recorded once and replayed.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from finetune.data.batches import Batch
from finetune.models.head import IGNORED, compiled_loss

# Measured on an H200, see docs/benchmarks.md; bytes are of activations, by finetune.models.shape.
SECONDS_LAUNCHED = 0.004  # for an eager layer by the host, forward and backward
BYTES_COMPUTED = 1.4e11  # a second by the GPU, layers as they are
BYTES_SPARED = 7e11  # that compiled layers are a second quicker for
SECONDS_CAPTURE = 0.3  # for one bucket
SECONDS_COMPILE = 26.0  # that they begin later, with an empty cache
SECONDS_CACHED = 6.0  # and with their code in the cache


@dataclass(frozen=True)
class Size:
    """What a pack holds, or has room for."""

    tokens: int
    rows: int
    kept: int  # supervised positions


@dataclass(frozen=True)
class Shapes:
    """The sizes that the packs of a run are filled up to: one for every bucket of tokens."""

    rooms: Mapping[int, Size]  # bucket -> room
    longest: int  # tokens of the longest row, and of any filling

    @classmethod
    def of(cls, sizes: Sequence[Size], *, longest: int) -> Shapes:
        """The fewest rooms that hold all `sizes`, at most 256 tokens too large, above 3072 tokens 512."""
        rooms: dict[int, Size] = {}
        for size in sizes:
            bucket = _bucket(size.tokens)
            room = rooms.get(bucket, Size(bucket, 0, 0))
            rooms[bucket] = Size(bucket, max(room.rows, size.rows), max(room.kept, size.kept))
        fillings = -(-512 // longest)
        return cls(
            {b: replace(r, rows=r.rows + fillings, kept=-(-r.kept // 64) * 64) for b, r in rooms.items()}, longest
        )

    def empty(self, bucket: int) -> Batch:
        """A pack of one row, filled up."""
        size = min(self.longest, bucket)
        row = Batch(
            ids=torch.zeros(1, size, dtype=torch.long),
            positions=torch.arange(size)[None],
            kept=torch.tensor([0]),
            labels=torch.tensor([0]),
            num_tokens=size,
            bounds=torch.tensor([0, size], dtype=torch.int32),
            longest=size,
        )
        return self._fill(row, self.rooms[bucket])

    def fill(self, batch: Batch) -> Batch:
        """The pack with rows that nobody asked for, up to its room; the loss of its kept positions is the same.

        Every token lies in a row: tokens outside of all rows gave gradients that were not numbers (seen).
        """
        return self._fill(batch, self.rooms[_bucket(batch.num_tokens)])

    def _fill(self, batch: Batch, room: Size) -> Batch:
        assert batch.bounds is not None
        starts = range(batch.num_tokens, room.tokens, self.longest)
        ends = torch.tensor([*starts[1:], room.tokens][: len(starts)], dtype=torch.int32)
        positions = [torch.arange(min(self.longest, room.tokens - start)) for start in starts]
        bounds = torch.cat([batch.bounds, ends])
        return Batch(
            ids=pad(batch.ids, (0, room.tokens - batch.num_tokens)),
            positions=torch.cat([batch.positions[0], *positions])[None],
            kept=pad(batch.kept, (0, room.kept - len(batch.kept))),
            labels=pad(batch.labels, (0, room.kept - len(batch.labels)), value=IGNORED),
            num_tokens=batch.num_tokens,
            bounds=pad(bounds, (0, room.rows + 1 - len(bounds)), value=room.tokens),
            longest=self.longest,
        )


def _bucket(tokens: int) -> int:
    step = 256 if tokens <= 3072 else 512
    return -(-tokens // step) * step


@dataclass(frozen=True)
class Work:
    """What takes a run's steps their time."""

    num_packs: int
    num_buckets: int
    num_layers: int
    num_bytes: float  # activations of all packs together


def quickest(work: Work, *, compilable: bool, alike: int) -> str:
    """How steps take the fewest seconds, capture and compilation included: eager, graph or compiled.

    One of so many runs `alike` compiles. What is in the cache already is not asked: a command computes its runs in the
    same way whatever ran before it.
    """
    computed = work.num_bytes / BYTES_COMPUTED
    recorded = computed + SECONDS_CAPTURE * work.num_buckets
    seconds = {"eager": max(computed, SECONDS_LAUNCHED * work.num_packs * work.num_layers), "graph": recorded}
    if compilable:
        later = SECONDS_CACHED + (SECONDS_COMPILE - SECONDS_CACHED) / alike
        seconds["compiled"] = recorded - work.num_bytes / BYTES_SPARED + later
    return min(seconds, key=seconds.__getitem__)


@contextlib.contextmanager
def compiled(layers: nn.ModuleList, embeddings: nn.Module) -> Iterator[None]:
    """Within, the layers are compiled, all as one, and the loss.

    The first layer would be another kind if its input had no gradient.
    """
    hook = embeddings.register_forward_hook(lambda module, args, output: output.requires_grad_())
    for layer in layers:
        layer.compile()
    try:
        with _recomputable(), compiled_loss():
            yield
    finally:
        hook.remove()
        for layer in layers:
            layer._compiled_call_impl = None


def _recomputable() -> contextlib.AbstractContextManager[None]:
    """Within, a compiled layer may keep an output for the next module in an object, and yet be recomputed backward."""
    import torch._dynamo  # takes seconds

    name = "skip_fwd_side_effects_in_bwd_under_checkpoint"
    known = hasattr(torch._dynamo.config, name)
    return torch._dynamo.config.patch({name: True}) if known else contextlib.nullcontext()


@functools.cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """One for all recordings of a process: cuBLAS keeps 32 MiB for every stream that it was used on."""
    return torch.cuda.Stream(device)


class Graphs:
    """Adds a pack's gradients to the weights' `.grad` and returns its summed loss, by replaying a graph."""

    def __init__(
        self,
        shapes: Shapes,
        *,
        way: str,
        loss: Callable[[Batch], Tensor],
        weights: Sequence[nn.Parameter],
        device: torch.device,
    ) -> None:
        self.shapes = shapes
        self.way = way
        self.loss = loss
        self.weights = weights
        self.scale = torch.ones((), device=device)
        self.stream = _stream(device)
        self.graphs: dict[int, tuple[torch.cuda.CUDAGraph, Batch, Tensor]] = {}
        self.drawn = torch.cuda.get_rng_state(device)
        self.recording = False  # has it begun? After a recording that was cut off nothing of CUDA can be relied on
        for weight in weights:
            weight.grad = torch.zeros_like(weight)

    def capture(self) -> None:
        """Record every bucket, the largest first, so that the others fit into its memory.

        All are run before, as what a first run compiles and allocates cannot be recorded. The memory of these runs is
        given back to the device then: between the recordings it would be needed beside the graphs' own.
        """
        device, pool = self.stream.device, torch.cuda.graph_pool_handle()
        batches = {n: self.shapes.empty(n).to(device) for n in sorted(self.shapes.rooms, reverse=True)}
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            for batch in (*batches.values(), batches[max(batches)]):
                self._run(batch)
        torch.cuda.current_stream().wait_stream(self.stream)
        self.recording = True
        self.graphs = {bucket: self._captured(batch, pool) for bucket, batch in batches.items()}
        self.zero()
        torch.cuda.set_rng_state(self.drawn, device)

    def abandon(self) -> None:
        """Leave everything as if there had been no graphs."""
        torch.cuda.current_stream().wait_stream(self.stream)
        torch.cuda.set_rng_state(self.drawn, self.stream.device)
        for weight in self.weights:
            weight.grad = None

    def _captured(self, batch: Batch, pool: Any) -> tuple[torch.cuda.CUDAGraph, Batch, Tensor]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, stream=self.stream):
            loss = self._run(batch)
        return graph, batch, loss

    def _run(self, batch: Batch) -> Tensor:
        loss = self.loss(batch)
        (loss * self.scale).backward()
        return loss.detach()

    def __call__(self, batch: Batch, *, scale: float) -> Tensor:
        """Summed loss of a pack on the CPU; gradients of `scale` times that are added."""
        batch = self.shapes.fill(batch)
        graph, static, loss = self.graphs[batch.ids.shape[1]]
        for name in ("ids", "positions", "kept", "labels", "bounds"):
            getattr(static, name).copy_(getattr(batch, name).pin_memory(), non_blocking=True)
        self.scale.fill_(scale)
        graph.replay()
        return loss.clone()

    def zero(self) -> None:
        """Forget the gradients, in place: the graphs know where they lie."""
        torch._foreach_zero_([weight.grad for weight in self.weights if weight.grad is not None])
