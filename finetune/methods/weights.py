"""The trained weights of the methods that PEFT lacks: one safetensors file, by parameter name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

FILE = "adapter.safetensors"


def write(model: Any, folder: Path) -> None:
    """Save every parameter that requires gradients."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({n: p.detach().cpu().contiguous() for n, p in model.named_parameters() if p.requires_grad}, folder / FILE)


@torch.no_grad()
def read(model: Any, folder: Path) -> Any:
    """Copy the saved weights into the parameters that require gradients; raises ValueError where names differ."""
    saved = load_file(folder / FILE)
    expected = {n: p for n, p in model.named_parameters() if p.requires_grad}
    if differing := sorted(saved.keys() ^ expected.keys()):
        raise ValueError(f"{folder / FILE} is of another method or base: {', '.join(differing[:4])}")
    for name, weight in saved.items():
        expected[name].copy_(weight)
    return model
