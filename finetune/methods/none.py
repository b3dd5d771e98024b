"""No tuning: the base answers as it is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from finetune.data.rows import Row
from finetune.methods.method import Method


class Untouched(Method):
    """The base itself."""

    trains = False
    replayable = ("decode",)

    def attach(self, model: Any, *, tokenizer: Any, num_steps: int, train_rows: Sequence[Row]) -> Any:
        """Freeze everything."""
        return model.requires_grad_(False)
