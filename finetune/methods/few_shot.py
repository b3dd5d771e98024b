"""The hard prompt: examples from the training rows before each question, and no training."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from finetune.data.rows import Row
from finetune.methods.method import Method

Turn = tuple[str, str]  # question, answer


class FewShot(Method):
    """In-context examples (Brown et al. 2020, arXiv:2005.14165), as earlier turns of the conversation.

    The same k examples stand before every row of a task; where they are too long, the last ones of them alone.
    """

    trains = False
    replayable = ("decode",)

    def __init__(self, *, k: int, seed: int) -> None:
        if k < 1:
            raise ValueError(f"k={k} must be at least 1; no examples at all is method=none")
        self.k, self.seed = k, seed
        self.given: list[int] = []  # examples of each row

    def attach(self, model: Any, *, tokenizer: Any, num_steps: int, train_rows: Sequence[Row]) -> Any:
        """Freeze everything."""
        return model.requires_grad_(False)

    def rows(self, rows: Sequence[Row], train_rows: Sequence[Row], *, fits: Callable[[Row], bool]) -> Sequence[Row]:
        """Each row after as many examples of its task as fit; those of its kind where training lacks the task."""
        examples = {key: self._draw(*key, train_rows) for key in dict.fromkeys((row.task, row.kind) for row in rows)}
        found = [_longest(row, examples[row.task, row.kind], fits=fits) for row in rows]
        self.given = [len(new.history) - len(row.history) for new, row in zip(found, rows, strict=True)]
        return found

    def notes(self) -> dict[str, int]:
        """Examples in all, and rows that got fewer than k."""
        return {"examples": sum(self.given), "rows_with_fewer_examples": sum(given < self.k for given in self.given)}

    def _draw(self, task: str, kind: str, train_rows: Sequence[Row]) -> list[Turn]:
        """k questions and answers."""
        pool = [row for row in train_rows if row.task == task] or [row for row in train_rows if row.kind == kind]
        drawn = random.Random(f"{self.seed}:{task}").sample(pool, min(self.k, len(pool)))
        return [(row.prompt, row.target) for row in drawn]


def _longest(row: Row, examples: Sequence[Turn], *, fits: Callable[[Row], bool]) -> Row:
    """The row after as many of the last examples as its prompt has room for."""
    asked = (replace(row, history=(*examples[first:], *row.history)) for first in range(len(examples)))
    return next(filter(fits, asked), row)
