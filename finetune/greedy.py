"""Greedy decoding with keys and values at fixed places: finished rows leave, and on a GPU a step is a CUDA graph.

The first pass is the model's own, with its own cache, so that whatever a method puts before a row is in it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, DynamicCache

from finetune.models.attention import attending
from finetune.models.fused import fused

NAME = "places"
ALIGNED = 8  # places: a GPU's attention copies a mask whose rows do not begin at a multiple of 16 bytes
LEAVE = 0.75  # finished rows leave when at most this share is still at work
# A GPU is asked for the finished rows every few steps; a new number of rows is a new graph, which few rows do not earn.
LOOK, LEAVE_CUDA, MIN_ROWS_CUDA = 8, 0.5, 64


def one_query(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor, **options: Any
) -> tuple[Tensor, None]:
    """Attention of one token a row, query (rows, heads, 1, size) -> (rows, 1, heads, size).

    The queries that share keys are the rows of one product: keys and values are not repeated for each.
    """
    rows, heads, _, size = query.shape
    grouped = query.to(value.dtype).view(rows, key.shape[1], -1, size)  # (rows, key heads, queries of each, size)
    out = scaled_dot_product_attention(
        grouped, key.to(value.dtype), value, attention_mask, scale=options.get("scaling")
    )
    return out.reshape(rows, 1, heads, size), None


AttentionInterface.register(NAME, one_query)


class Places:
    """A cache of a fixed size: `update` writes one token's keys and values at `place`."""

    def __init__(self, cache: DynamicCache, *, num_new: int) -> None:
        """Room for at least `num_new` more tokens behind what `cache` holds."""
        before = cache.get_seq_length()
        room = num_new + -(before + num_new) % ALIGNED
        self.keys, self.values = ([_longer(x, room) for x in both] for both in _states(cache))
        self.seen = self.num_places = before + room  # how many of them attention looks at
        self.place = torch.full((1,), before, device=self.keys[0].device)

    def update(self, key: Tensor, value: Tensor, layer: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Keys and values (rows, heads, places, size) with those of the new token (rows, heads, 1, size)."""
        found = self.keys[layer], self.values[layer]
        for old, new in zip(found, (key, value), strict=True):
            old.index_copy_(2, self.place, new.to(old.dtype))
        return found[0][:, :, : self.seen], found[1][:, :, : self.seen]

    def get_seq_length(self, layer: int = 0) -> int:
        """Never 0: the first pass is over. Positions are given, so that nothing else depends on it."""
        return self.num_places

    def keep(self, rows: Tensor) -> None:
        """Only these rows go on."""
        for states in (self.keys, self.values):
            for layer, old in enumerate(states):  # one after the other: both at once would need twice the memory
                states[layer] = old.index_select(0, rows)


def greedy(  # noqa: PLR0913
    model: Any, ids: Tensor, mask: Tensor, num_new: int, *, end_ids: Sequence[int], pad_id: int, replayed: bool = False
) -> Tensor:
    """New tokens (rows, `num_new`) of left-padded prompts, `pad_id` after the end token.

    As transformers' greedy `generate`; for bases that take a four-dimensional mask and position ids.
    """
    with fused(model):
        cache = DynamicCache(config=model.config)
        first = _first(model, ids, mask, cache)
        state = _State(model, first, cache, mask, num_new, ends=end_ids, pad_id=pad_id)
        with attending(model, NAME):
            for done in range(2, num_new + 1):
                state.advance(replayed=replayed)
                if not ids.is_cuda or done % LOOK == 0:
                    state.leave()
                if not state.rows:
                    break
        state.leave(all_rows=True)
    return state.answers


def _first(model: Any, ids: Tensor, mask: Tensor, cache: DynamicCache) -> Tensor:
    """The first new token of every row (rows,); the cache is filled."""
    head = model.get_output_embeddings()
    # Of a slice of all states the product with the head would be one for every row, which reads the head as often.
    hook = head.register_forward_pre_hook(lambda module, given: (given[0].contiguous(), *given[1:]))
    try:
        logits = model(
            input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0), past_key_values=cache,
            use_cache=True, logits_to_keep=1,
        ).logits  # fmt: skip
    finally:
        hook.remove()
    found: Tensor = logits[:, -1].argmax(-1)
    return found


class _State:
    """Rows at work, and the answers of all."""

    def __init__(  # noqa: PLR0913
        self, model: Any, first: Tensor, cache: Any, mask: Tensor, num_new: int, *, ends: Sequence[int], pad_id: int
    ) -> None:
        self.model, self.pad_id, self.cuda = model, pad_id, first.is_cuda
        self.ends = torch.tensor(list(ends), device=first.device)
        self.cache = Places(cache, num_new=num_new)
        self.num_before = int(cache.get_seq_length()) - mask.shape[1]  # virtual tokens, which no mask counts
        self.answers = torch.full((len(first), num_new), pad_id, device=first.device)
        self.numbers = torch.arange(len(first), device=first.device)  # of the rows at work
        self.said = self.answers.clone()  # by the rows at work
        self.said[:, 0] = first
        self.count = torch.ones(1, dtype=torch.long, device=first.device)
        self.token = first[:, None].clone()
        self.position = mask.sum(-1, keepdim=True)
        self.mask = self._unseen(mask)
        self.over = self._ending(first)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.fresh = True  # no step of so many rows yet: what a kernel's first launch allocates cannot be recorded

    @property
    def rows(self) -> int:
        """How many are at work."""
        return len(self.numbers)

    def advance(self, *, replayed: bool) -> None:
        """One more token for every row; of as many rows the first step is run, the others are replayed."""
        if not replayed or self.fresh:
            self.step()
            self.fresh = False
            return
        self.graph = self.graph or self._captured()
        self.graph.replay()

    def step(self) -> None:
        """One more token for every row; all in place."""
        if not self.cuda:
            self.cache.seen = int(self.cache.place) + 1
        self.mask.index_fill_(3, self.cache.place - self.num_before, 0.0)
        logits = self.model(
            input_ids=self.token,
            attention_mask=self.mask[..., : self.cache.seen - self.num_before],
            position_ids=self.position,
            past_key_values=self.cache,
            use_cache=True,
        ).logits
        new = logits[:, -1].argmax(-1).masked_fill(self.over, self.pad_id)
        self.said.index_copy_(1, self.count, new[:, None])
        self.over |= self._ending(new)
        self.token.copy_(new[:, None])
        for counter in (self.position, self.cache.place, self.count):
            counter += 1

    def leave(self, *, all_rows: bool = False) -> None:
        """Write down what finished rows said, and go on without them if they are many."""
        left = (~self.over).nonzero()[:, 0]
        few = len(left) <= (LEAVE_CUDA if self.cuda else LEAVE) * self.rows
        if not all_rows and len(left) and (not few or (self.cuda and self.rows <= MIN_ROWS_CUDA)):
            return
        self.answers[self.numbers] = self.said
        if all_rows:
            return
        self.numbers = self.numbers[left]
        self.cache.keep(left)
        for name in ("said", "token", "position", "mask", "over"):
            setattr(self, name, getattr(self, name).index_select(0, left))
        self.graph, self.fresh = None, True

    def _unseen(self, mask: Tensor) -> Tensor:
        """(rows, 1, 1, places): 0 for what attention sees, else -inf; of booleans each layer would make that again."""
        width = self.cache.num_places - self.num_before
        found = torch.full((len(mask), 1, 1, width), -math.inf, dtype=self.cache.values[0].dtype, device=mask.device)
        found[:, 0, 0, : mask.shape[1]].masked_fill_(mask.bool(), 0.0)
        return found

    def _ending(self, tokens: Tensor) -> Tensor:
        """Which of the tokens (rows,) end an answer; `torch.isin` asks the host where there are many ends."""
        return (tokens[:, None] == self.ends).any(dim=1)

    def _captured(self) -> torch.cuda.CUDAGraph:
        """The step as a graph; recording it runs nothing."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.step()
        return graph


def _states(cache: Any) -> tuple[list[Tensor], list[Tensor]]:
    return [layer.keys for layer in cache.layers], [layer.values for layer in cache.layers]


def _longer(states: Tensor, num_new: int) -> Tensor:
    """(rows, heads, tokens + num_new, size), zeros at the end."""
    return torch.nn.functional.pad(states, (0, 0, 0, num_new))
