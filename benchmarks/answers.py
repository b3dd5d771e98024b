"""How the peers answer: `generate` in batches of 8, in the order of the rows, then the scores of this project."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from benchmarks.rows import END, MOST, PAD, Row, text
from finetune.data import rows as data
from finetune.outcome import lines
from finetune.scores import aggregate

BATCH_ROWS = 8


@torch.no_grad()
def answers(model: Any, some: Sequence[Row], *, batch_rows: int = BATCH_ROWS) -> list[list[int]]:
    """New tokens of every row, without the end."""
    model.eval()
    said: list[list[int]] = []
    for first in range(0, len(some), batch_rows):
        prompts = [row.ids[: row.num_prompt] for row in some[first : first + batch_rows]]
        longest = max(map(len, prompts))
        ids = torch.tensor([[PAD] * (longest - len(prompt)) + prompt for prompt in prompts], device=model.device)
        how = {"max_new_tokens": MOST, "do_sample": False, "eos_token_id": END, "pad_token_id": PAD, "use_cache": True}
        new = model.generate(input_ids=ids, attention_mask=(ids != PAD).long(), **how)[:, longest:]
        said += [_ended(tokens) for tokens in new.tolist()]
    return said


def _ended(tokens: list[int]) -> list[int]:
    return tokens[: tokens.index(END)] if END in tokens else tokens


def as_given(said: Sequence[Sequence[int]], some: Sequence[Row]) -> float:
    """The share of answers that are as long as they should be."""
    return sum(len(a) + 1 == row.num_answer for a, row in zip(said, some, strict=True)) / len(some)


def score(said: Sequence[Sequence[int]], some: Sequence[Row]) -> dict[str, Any]:
    """The scores of a run, as this project computes them."""
    asked = [
        data.Row(str(n), "given", "instruction", text(row.ids[: row.num_prompt]), text(row.ids[row.num_prompt : -1]))
        for n, row in enumerate(some)
    ]
    return aggregate(lines(asked, [(text(ids), "stop") for ids in said]))
