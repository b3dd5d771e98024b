"""Rows -> generated texts: greedy, sorted by length, in large batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
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
def predict(
    model: Any, prompts: Sequence[Sequence[int]], decoding: Decoding, *, virtual: Tensor | None = None
) -> Iterator[list[Answer]]:
    """Answers in batches, longest prompts first; `virtual` (virtual tokens, hidden) comes before each prompt."""
    model.eval()
    order = sorted(range(len(prompts)), key=lambda n: (-len(prompts[n]), n))
    for first in range(0, len(order), decoding.batch_rows):
        numbers = order[first : first + decoding.batch_rows]
        inputs = _inputs(model, [prompts[n] for n in numbers], decoding, virtual)
        output = model.generate(
            **inputs,
            max_new_tokens=decoding.max_new_tokens,
            do_sample=False,
            eos_token_id=list(decoding.end_ids),
            pad_token_id=decoding.pad_id,
            use_cache=True,
        )
        new = output[:, inputs["input_ids"].shape[1] :] if "input_ids" in inputs else output
        yield [_answer(n, tokens, set(decoding.end_ids)) for n, tokens in zip(numbers, new.tolist(), strict=True)]


def _inputs(
    model: Any, prompts: Sequence[Sequence[int]], decoding: Decoding, virtual: Tensor | None
) -> dict[str, Tensor]:
    """Padded ids (rows, longest), or embeddings (rows, virtual + longest, hidden), and their mask.

    PEFT puts virtual tokens before the padding and drops position ids, so a shorter prompt stands further from them
    (seen: answers then depend on the batch); here they stand directly before each prompt.
    """
    parts = [torch.tensor(prompt, device=model.device) for prompt in prompts]
    if virtual is not None:
        embed = model.get_input_embeddings()
        parts = [torch.cat([virtual, embed(part).to(virtual.dtype)]) for part in parts]
    side = decoding.padding_side
    mask = pad_sequence([part.new_ones(len(part), dtype=torch.long) for part in parts], True, 0, side)
    padded = pad_sequence(parts, True, decoding.pad_id if virtual is None else 0.0, side)
    if virtual is None:
        return {"input_ids": padded, "attention_mask": mask}
    return {"inputs_embeds": padded.to(model.dtype), "attention_mask": mask}


def _answer(number: int, ids: list[int], ends: set[int]) -> Answer:
    """The new tokens up to the first end token, and why they ended."""
    stop = next((i for i, token in enumerate(ids) if token in ends), None)
    return Answer(number, ids, "length") if stop is None else Answer(number, ids[:stop], "stop")
