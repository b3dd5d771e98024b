"""Rows -> generated texts: greedy, sorted by length, in large batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from finetune.data.batches import Example


@dataclass(frozen=True)
class Answer:
    """What a model said to one prompt."""

    number: int  # of the prompt
    ids: list[int]  # new tokens without the end token
    finish_reason: str  # stop | length


def answer_limit(examples: Sequence[Example]) -> int:
    """Tokens of the longest training target, its end token included: no answer needs more."""
    return max(len(example.ids) - example.num_prompt for example in examples)


@dataclass(frozen=True)
class Decoding:
    """How answers are generated."""

    max_new_tokens: int
    batch_rows: int  # prompts decoded together
    end_ids: Sequence[int]
    pad_id: int
    padding_side: str = "left"


@torch.no_grad()
def predict(model: Any, prompts: Sequence[Sequence[int]], decoding: Decoding) -> Iterator[list[Answer]]:
    """Answers in batches, longest prompts first."""
    model.eval()
    order = sorted(range(len(prompts)), key=lambda n: (-len(prompts[n]), n))
    for first in range(0, len(order), decoding.batch_rows):
        numbers = order[first : first + decoding.batch_rows]
        ids, mask = _padded([prompts[n] for n in numbers], pad_id=decoding.pad_id, side=decoding.padding_side)
        output = model.generate(
            input_ids=ids.to(model.device),
            attention_mask=mask.to(model.device),
            max_new_tokens=decoding.max_new_tokens,
            do_sample=False,
            eos_token_id=list(decoding.end_ids),
            pad_token_id=decoding.pad_id,
            use_cache=True,
        )
        new = output[:, ids.shape[1] :].tolist()
        yield [_answer(n, tokens, set(decoding.end_ids)) for n, tokens in zip(numbers, new, strict=True)]


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


def _answer(number: int, ids: list[int], ends: set[int]) -> Answer:
    """The new tokens up to the first end token, and why they ended."""
    stop = next((i for i, token in enumerate(ids) if token in ends), None)
    return Answer(number, ids, "length") if stop is None else Answer(number, ids[:stop], "stop")
