"""Rows -> generated texts: greedy, sorted by length, in large batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from finetune.data.batches import Example


def answer_limit(examples: Sequence[Example]) -> int:
    """Tokens of the longest training target, its end token included: no answer needs more."""
    return max(len(example.ids) - example.num_prompt for example in examples)


@torch.no_grad()
def predict(
    model: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    batch_rows: int,
    ends: Sequence[int],
    pad_id: int,
    padding_side: str = "left",
) -> Iterator[list[tuple[int, list[int], str]]]:
    """Batches of (row number, new token ids without the end token, "stop" or "length"), longest prompts first."""
    model.eval()
    order = sorted(range(len(prompts)), key=lambda n: (-len(prompts[n]), n))
    for first in range(0, len(order), batch_rows):
        numbers = order[first : first + batch_rows]
        ids, mask = _padded([prompts[n] for n in numbers], pad_id=pad_id, side=padding_side)
        output = model.generate(
            input_ids=ids.to(model.device),
            attention_mask=mask.to(model.device),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=list(ends),
            pad_token_id=pad_id,
            use_cache=True,
        )
        texts = [_cut(new, set(ends)) for new in output[:, -(output.shape[1] - ids.shape[1]) :].tolist()]
        yield [(n, *text) for n, text in zip(numbers, texts, strict=True)]


def _padded(prompts: Sequence[Sequence[int]], *, pad_id: int, side: str) -> tuple[Tensor, Tensor]:
    """Ids and mask, each (rows, longest)."""
    longest = max(map(len, prompts))
    ids = torch.full((len(prompts), longest), pad_id)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        where = slice(longest - len(prompt), longest) if side == "left" else slice(len(prompt))
        ids[row, where] = torch.tensor(prompt)
        mask[row, where] = 1
    return ids, mask


def _cut(ids: list[int], ends: set[int]) -> tuple[list[int], str]:
    """New tokens up to the first end token, and why they ended."""
    stop = next((i for i, token in enumerate(ids) if token in ends), None)
    return (ids, "length") if stop is None else (ids[:stop], "stop")
