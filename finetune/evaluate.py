"""Rows -> generated texts: greedy, sorted by length, in large batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

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
        ids = [torch.tensor(prompts[n], device=model.device) for n in numbers]
        inputs = pad_sequence(ids, True, decoding.pad_id, decoding.padding_side)  # (rows, longest)
        mask = pad_sequence([torch.ones_like(part) for part in ids], True, 0, decoding.padding_side)
        output = model.generate(
            input_ids=inputs,
            attention_mask=mask,
            max_new_tokens=decoding.max_new_tokens,
            do_sample=False,
            eos_token_id=list(decoding.end_ids),
            pad_token_id=decoding.pad_id,
            use_cache=True,
        )
        new = output[:, inputs.shape[1] :]
        yield [_answer(n, tokens, set(decoding.end_ids)) for n, tokens in zip(numbers, new.tolist(), strict=True)]


def _answer(number: int, ids: list[int], ends: set[int]) -> Answer:
    """The new tokens up to the first end token, and why they ended."""
    stop = next((i for i, token in enumerate(ids) if token in ends), None)
    return Answer(number, ids, "length") if stop is None else Answer(number, ids[:stop], "stop")
