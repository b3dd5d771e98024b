"""LoRA+: LoRA with a higher learning rate for the factor that starts at zero."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peft import LoraConfig
from torch import nn

from finetune.data.rows import Row
from finetune.methods.method import Method
from finetune.methods.peft import Peft


class LoraPlus(Method):
    """Hayou et al. 2024, arXiv:2402.12354: B learns `lr_ratio` times as fast as A; parameters as LoRA, r (in + out)."""

    def __init__(self, *, lr_ratio: float, **arguments: Any) -> None:
        if lr_ratio <= 0:
            raise ValueError(f"lr_ratio={lr_ratio} must be positive")
        self.lr_ratio = lr_ratio
        self.lora = Peft(LoraConfig(**arguments))

    def attach(self, model: Any, *, tokenizer: Any, num_steps: int, train_rows: Sequence[Row]) -> Any:
        """As LoRA."""
        return self.lora.attach(model, tokenizer=tokenizer, num_steps=num_steps, train_rows=train_rows)

    def parameter_groups(self, model: nn.Module, lr: float) -> list[dict[str, Any]]:
        """`lr` for A (and magnitudes), `lr_ratio` times that for B."""
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        slow = [p for name, p in named if "lora_B" not in name and "lora_embedding_B" not in name]
        fast = [p for name, p in named if "lora_B" in name or "lora_embedding_B" in name]
        return [{"params": slow, "lr": lr}, {"params": fast, "lr": lr * self.lr_ratio}]

    def lean(self, model: nn.Module) -> contextlib.AbstractContextManager[None]:
        """As LoRA."""
        return self.lora.lean(model)

    def save(self, model: Any, folder: Path) -> None:
        """As PEFT reads it back."""
        self.lora.save(model, folder)

    def load(self, model: Any, folder: Path) -> Any:
        """PEFT's own loading, from safetensors."""
        return self.lora.load(model, folder)
