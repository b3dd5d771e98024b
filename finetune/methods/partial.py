"""Training some of the base's own weights: its last blocks, or its biases."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from finetune.data.rows import Row
from finetune.methods import weights
from finetune.methods.blocks import blocks
from finetune.methods.method import Method


class Part(Method):
    """Trains a part of the base's own weights; a subclass says which."""

    leaves_base_intact = False

    def attach(self, model: Any, *, tokenizer: Any, num_steps: int, train_rows: Sequence[Row]) -> Any:
        """Unfreeze the part."""
        return self._unfrozen(model)

    def save(self, model: Any, folder: Path) -> None:
        """The part alone."""
        weights.write(model, folder)

    def load(self, model: Any, folder: Path) -> Any:
        """The saved part in place of the base's."""
        return weights.read(self._unfrozen(model), folder)

    def unfreeze(self, model: Any) -> None:
        """Make the part of a frozen model trainable; raises ValueError if the base has no such part."""
        raise NotImplementedError

    def _unfrozen(self, model: Any) -> Any:
        if getattr(model, "is_quantized", False):
            raise ValueError("quantized weights cannot be trained; use method.quantize=null")
        self.unfreeze(model.requires_grad_(False))
        return model


class LastBlocks(Part):
    """Freeze all but the last blocks: n x P parameters for blocks of P; embeddings, final norm and head stay frozen."""

    def __init__(self, *, num_blocks: int) -> None:
        if num_blocks < 1:
            raise ValueError(f"num_blocks={num_blocks} must be at least 1")
        self.num_blocks = num_blocks

    def unfreeze(self, model: Any) -> None:
        """The last blocks."""
        found = blocks(model)
        if self.num_blocks > len(found):
            raise ValueError(f"num_blocks={self.num_blocks}, but the base has {len(found)} blocks")
        for block in found[-self.num_blocks :]:
            block.requires_grad_(True)


class Biases(Part):
    """BitFit (Ben Zaken et al. 2022, arXiv:2106.10199): every bias of the base and nothing else.

    (11 L + 2) d parameters for L blocks of width d on BLOOM; L (d + 2 k) on Qwen2, whose query, key (k) and value
    projections alone have biases.
    """

    def unfreeze(self, model: Any) -> None:
        """The biases."""
        biases = [p for name, p in model.named_parameters() if name.endswith(".bias")]
        if not biases:
            raise ValueError(f"{type(model).__name__} has no biases to train")
        for bias in biases:
            bias.requires_grad_(True)
