"""Rows -> generated texts: greedy, sorted by length, in large batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from finetune.data.batches import Example
from finetune.greedy import greedy


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
    in_places: bool = False  # by finetune.greedy, which the base and the method must allow; else by `generate`
    replayed: bool = False  # on a GPU, the steps of that as CUDA graphs


def planned(prompts: Sequence[Sequence[int]], batch_rows: int) -> list[list[int]]:
    """The numbers of the prompts that are answered together, longest prompts first."""
    order = sorted(range(len(prompts)), key=lambda n: (-len(prompts[n]), n))
    return [order[first : first + batch_rows] for first in range(0, len(order), batch_rows)]


@torch.no_grad()
def predict(model: Any, prompts: Sequence[Sequence[int]], decoding: Decoding) -> Iterator[list[Answer]]:
    """Answers in batches, longest prompts first."""
    model.eval()
    for numbers in planned(prompts, decoding.batch_rows):
        ids = [torch.tensor(prompts[n], device=model.device) for n in numbers]
        inputs = pad_sequence(ids, True, decoding.pad_id, decoding.padding_side)  # (rows, longest)
        mask = pad_sequence([torch.ones_like(part) for part in ids], True, 0, decoding.padding_side)
        new = _new_tokens(model, inputs, mask, decoding)
        yield [_answer(n, tokens, set(decoding.end_ids)) for n, tokens in zip(numbers, new.tolist(), strict=True)]


def _new_tokens(model: Any, ids: Tensor, mask: Tensor, decoding: Decoding) -> Tensor:
    """(rows, new) tokens that follow the prompts (rows, tokens)."""
    if decoding.in_places and decoding.padding_side == "left":
        replayed = decoding.replayed and ids.is_cuda
        end_ids, pad_id = decoding.end_ids, decoding.pad_id
        return greedy(model, ids, mask, decoding.max_new_tokens, end_ids=end_ids, pad_id=pad_id, replayed=replayed)
    output: Tensor = model.generate(
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=decoding.max_new_tokens,
        do_sample=False,
        eos_token_id=list(decoding.end_ids),
        pad_token_id=decoding.pad_id,
        use_cache=True,
    )
    return output[:, ids.shape[1] :]


def _answer(number: int, ids: list[int], ends: set[int]) -> Answer:
    """The new tokens up to the first end token, and why they ended."""
    stop = next((i for i, token in enumerate(ids) if token in ends), None)
    return Answer(number, ids, "length") if stop is None else Answer(number, ids[:stop], "stop")
