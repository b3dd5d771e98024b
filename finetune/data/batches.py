"""Token examples -> batches: which rows make a step, and how they lie in memory."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

Item = TypeVar("Item")
WASTE = 0.25  # share of a padded batch that may be padding before its rows are split by length


class Example(Protocol):
    """A row as tokens: prompt, then target and the end token."""

    @property
    def ids(self) -> Sequence[int]:
        """Token ids."""

    @property
    def num_prompt(self) -> int:
        """Number of leading tokens that are not supervised."""


@dataclass(frozen=True)
class Batch:
    """Rows of one forward pass: packed as one sequence (`bounds` set) or right-padded (`mask` set)."""

    ids: Tensor  # (1, tokens) or (rows, length)
    positions: Tensor  # the same shape, from 0 in each row
    kept: Tensor  # (supervised,) index into the flattened ids of the positions whose next token is supervised
    labels: Tensor  # (supervised,) those next tokens
    num_tokens: int  # real ones
    bounds: Tensor | None = None  # (rows + 1,) int32, start of each row and the end
    longest: int = 0  # tokens of the longest row
    mask: Tensor | None = None  # (rows, length), 1 where a token is real

    def to(self, device: torch.device) -> Batch:
        """The batch on `device`."""
        moved: dict[str, Any] = {
            k: v.to(device, non_blocking=True) for k, v in vars(self).items() if isinstance(v, Tensor)
        }
        return replace(self, **moved)


def bounded(items: Iterable[Item], *, size: Callable[[Item], int], limit: int) -> Iterator[list[Item]]:
    """The items in order, in groups of at most `limit` together; one that is larger is alone."""
    group: list[Item] = []
    total = 0
    for item in items:
        own = size(item)
        if group and total + own > limit:
            yield group
            group, total = [], 0
        group.append(item)
        total += own
    if group:
        yield group


def plan(num_rows: int, *, epochs: float, batch_rows: int, max_steps: int | None, seed: int) -> list[list[int]]:
    """Row numbers of every optimizer step: each epoch a new order; the last batch is filled from a further epoch."""
    num_steps = math.ceil(epochs * num_rows / batch_rows)
    num_steps = min(num_steps, max_steps or num_steps)
    order = _order(num_rows, seed=seed)
    return [list(itertools.islice(order, batch_rows)) for _ in range(num_steps)]


def plan_by_tokens(
    lengths: Sequence[int], *, epochs: float, batch_tokens: int, max_steps: int | None, seed: int
) -> list[list[int]]:
    """As `plan` with the same order of rows, each step as many of them as have at most `batch_tokens` tokens together.

    `lengths` are the rows' real tokens, none more than `batch_tokens`. Steps begin until the epochs are over, so that
    the number of steps follows from the lengths, and the last step is as full as the others.
    """
    assert 0 < max(lengths) <= batch_tokens
    order = _order(len(lengths), seed=seed)
    left = math.ceil(epochs * len(lengths))
    steps: list[list[int]] = []
    row = next(order)
    while left > 0 and len(steps) != max_steps:
        step, size = [], 0
        while size + lengths[row] <= batch_tokens:
            step.append(row)
            size += lengths[row]
            row = next(order)
        steps.append(step)
        left -= len(step)
    return steps


def _order(num_rows: int, *, seed: int) -> Iterator[int]:
    """Row numbers without end, each epoch in a new order."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from torch.randperm(num_rows, generator=generator).tolist()


def supervised(example: Example, *, loss_on: str) -> range:
    """Positions whose next token counts in the loss."""
    first = max(example.num_prompt, 1) if loss_on == "target" else 1
    return range(first - 1, len(example.ids) - 1)


def pack(examples: Sequence[Example], *, loss_on: str = "target") -> Batch:
    """All rows in one sequence without padding; positions restart at each row."""
    lengths = [len(example.ids) for example in examples]
    starts = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    kept = [s + t for s, e in zip(starts, examples, strict=False) for t in supervised(e, loss_on=loss_on)]
    ids = torch.tensor([i for example in examples for i in example.ids])
    return Batch(
        ids=ids[None],
        positions=torch.cat([torch.arange(n) for n in lengths])[None],
        kept=torch.tensor(kept, dtype=torch.long),
        labels=ids[torch.tensor(kept, dtype=torch.long) + 1],
        num_tokens=len(ids),
        bounds=torch.tensor(starts, dtype=torch.int32),
        longest=max(lengths),
    )


def pad(examples: Sequence[Example], *, pad_id: int, loss_on: str = "target") -> Batch:
    """Right-padded rows."""
    length = max(len(example.ids) for example in examples)
    ids = torch.tensor([[*e.ids, *[pad_id] * (length - len(e.ids))] for e in examples])
    mask = torch.tensor([[1] * len(e.ids) + [0] * (length - len(e.ids)) for e in examples])
    kept = [n * length + t for n, e in enumerate(examples) for t in supervised(e, loss_on=loss_on)]
    index = torch.tensor(kept, dtype=torch.long)
    return Batch(
        ids=ids,
        positions=torch.arange(length).expand_as(ids),
        kept=index,
        labels=ids.flatten()[index + 1],
        num_tokens=int(mask.sum()),
        longest=length,
        mask=mask,
    )


def group(examples: Sequence[Example]) -> Iterator[list[Example]]:
    """Rows sorted by length and cut so that at most a quarter of each group is padding."""
    found: list[Example] = []
    for example in sorted(examples, key=lambda e: len(e.ids)):
        longest, real = len(example.ids), sum(len(e.ids) for e in found) + len(example.ids)
        if found and real < (1 - WASTE) * longest * (len(found) + 1):
            yield found
            found = []
        found.append(example)
    if found:
        yield found
