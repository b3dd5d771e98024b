"""Training some of the base's own weights: its last blocks, or its biases."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from finetune.data.rows import Row
from finetune.methods import weights
from finetune.methods.blocks import blocks
from finetune.methods.method import Method


class LastBlocks(Method):
    """Freeze all but the last blocks: n x P parameters for blocks of P; embeddings, final norm and head stay frozen."""

    leaves_base_intact = False

    def __init__(self, *, num_blocks: int) -> None:
        if num_blocks < 1:
            raise ValueError(f"num_blocks={num_blocks} must be at least 1")
        self.num_blocks = num_blocks

    def attach(self, model: Any, *, tokenizer: Any, num_steps: int, train_rows: Sequence[Row]) -> Any:
        """Unfreeze the last blocks."""
        return self._unfreeze(model)

    def save(self, model: Any, folder: Path) -> None:
        """The trained blocks alone."""
        weights.write(model, folder)

    def load(self, model: Any, folder: Path) -> Any:
        """The saved blocks in place of the base's."""
        return weights.read(self._unfreeze(model), folder)

    def _unfreeze(self, model: Any) -> Any:
        _refuse_quantized(model)
        found = blocks(model)
        if self.num_blocks > len(found):
            raise ValueError(f"num_blocks={self.num_blocks}, but the base has {len(found)} blocks")
        model.requires_grad_(False)
        for block in found[-self.num_blocks :]:
            block.requires_grad_(True)
        return model


class Biases(Method):
    """BitFit (Ben Zaken et al. 2022, arXiv:2106.10199): every bias of the base and nothing else.

    (11 L + 2) d parameters for L blocks of width d on BLOOM; L (d + 2 k) on Qwen2, whose query, key (k) and value
    projections alone have biases.
    """

    leaves_base_intact = False

    def attach(self, model: Any, *, tokenizer: Any, num_steps: int, train_rows: Sequence[Row]) -> Any:
        """Unfreeze the biases; raises ValueError if the base has none."""
        return self._unfreeze(model)

    def save(self, model: Any, folder: Path) -> None:
        """The biases alone."""
        weights.write(model, folder)

    def load(self, model: Any, folder: Path) -> Any:
        """The saved biases in place of the base's."""
        return weights.read(self._unfreeze(model), folder)

    def _unfreeze(self, model: Any) -> Any:
        _refuse_quantized(model)
        biases = [p for name, p in model.requires_grad_(False).named_parameters() if name.endswith(".bias")]
        if not biases:
            raise ValueError(f"{type(model).__name__} has no biases to train")
        for bias in biases:
            bias.requires_grad_(True)
        return model


def _refuse_quantized(model: Any) -> None:
    if getattr(model, "is_quantized", False):
        raise ValueError("quantized weights cannot be trained; use method.quantize=null")
