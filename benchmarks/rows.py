"""The rows that every contender gets: random tokens, as many and as mixed as those of three PromptCBLUE tasks.

Token END ends an answer. A prompt that is to be answered may end with token END + n: then the bases of
benchmarks.shapes answer n tokens, the last of them END. Every token has a word of two Chinese characters.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # it would import torch
    from finetune.data.batches import Example

PAD, END = 0, 1
MOST = 160  # tokens of an answer, the end included
# IMCS-V2-DAC, CMeEE-V2 and IMCS-V2-MRG: training rows, mean tokens, supervised share.
TASKS = ((1536, 125, 0.05), (1492, 125, 0.35), (872, 640, 0.11))
SPREAD = 0.35  # of the logarithm of a length
LEAST, LONGEST = 40, 1077  # tokens of a row


@dataclass(frozen=True)
class Row:
    """A row as tokens."""

    ids: list[int]
    num_prompt: int

    @property
    def num_answer(self) -> int:
        """Tokens of the answer, the end included."""
        return len(self.ids) - self.num_prompt


def rows(count: int, *, vocab_size: int, seed: int = 0, announced: bool = False, times: float = 1) -> list[Row]:
    """Rows with a mean of 240 tokens (or `times` that), 15 % of them supervised.

    If `announced`, a base answers each with as many tokens as its own answer has.
    """
    draw = random.Random(seed)
    found = []
    for _, mean, share in draw.choices(TASKS, weights=[task[0] for task in TASKS], k=count):
        length = draw.lognormvariate(math.log(mean) - SPREAD**2 / 2, SPREAD)
        number = min(LONGEST, max(LEAST, round(length)))
        number = round(times * number)
        answer = min(MOST, max(2, round(share * number)))
        ids = [*(draw.randrange(END + MOST + 1, vocab_size - 1) for _ in range(number - 1)), END]
        if announced:
            ids[number - answer - 1] = END + answer
        found.append(Row(ids, number - answer))
    return found


def num_tokens(some: Sequence[Example]) -> int:
    """Real tokens of the rows."""
    return sum(len(row.ids) for row in some)


def word(token: int) -> str:
    """Two Chinese characters, others for every token."""
    return chr(0x4E00 + token // 400) + chr(0x5000 + token % 400)


def text(ids: Sequence[int]) -> str:
    """Tokens as words with spaces between them."""
    return " ".join(map(word, ids))


def write(file: Path, some: Sequence[Row]) -> Path:
    """The rows as JSON lines for `task=jsonl`."""
    lines = [
        {"id": f"{file.stem}-{number}", "prompt": text(row.ids[: row.num_prompt]), "target": _target(row)}
        for number, row in enumerate(some)
    ]
    file.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    return file


def _target(row: Row) -> str:
    return text(row.ids[row.num_prompt : -1])
