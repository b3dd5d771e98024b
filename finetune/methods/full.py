"""Full tuning: every weight of the base is trained."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from finetune.data.rows import Row
from finetune.methods.method import Method


class Full(Method):
    """Train every parameter; P parameters for a base of P."""

    leaves_base_intact = False
    replayable = ("graph",)

    def attach(self, model: Any, *, tokenizer: Any, num_steps: int, train_rows: Sequence[Row]) -> Any:
        """Unfreeze everything."""
        return model.requires_grad_(True)

    def save(self, model: Any, folder: Path) -> None:
        """A whole model, as `from_pretrained` reads it."""
        model.save_pretrained(folder)

    def load(self, model: Any, folder: Path) -> Any:
        """The saved model in place of the base."""
        return type(model).from_pretrained(folder, dtype=model.dtype).to(model.device)
