"""RMSNorm (Zhang and Sennrich 2019, eq. 4) as one operation: transformers' own is eight, a small kernel each.

What it computes is rounded once, not after every operation; in float32 it is the same to rounding.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import rms_norm


@contextlib.contextmanager
def fused(model: nn.Module) -> Iterator[None]:
    """Within, the model's RMSNorms are one operation each, except where a compiler fuses them itself."""
    known: dict[type, bool] = {}
    found: list[Any] = []
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm") and "forward" not in vars(module):
            if type(module) not in known:
                known[type(module)] = _plain(module)
            if known[type(module)]:
                found.append(module)
    for module in found:
        module.forward = MethodType(_forward, module)
    try:
        yield
    finally:
        for module in found:
            del module.forward


@torch.no_grad()
def _plain(module: Any) -> bool:
    """Is it w x / sqrt(mean(x^2) + eps)? Others scale by 1 + w, or add eps elsewhere."""
    weight, eps = getattr(module, "weight", None), getattr(module, "variance_epsilon", None)
    if weight is None or eps is None or not weight.is_floating_point() or not weight.any():
        return False
    x = torch.linspace(-1.5, 2.5, weight.numel(), device=weight.device, dtype=weight.dtype)
    x = torch.stack([x, x * eps**0.5])  # of the second, half is eps
    close = 4 * torch.finfo(weight.dtype).eps  # each is rounded twice or thrice
    return torch.allclose(rms_norm(x, weight.shape, weight, eps), type(module).forward(module, x), rtol=close, atol=0)


def _forward(module: Any, hidden: Tensor) -> Tensor:
    """What takes the place of a norm's forward: (..., width) -> (..., width)."""
    weight = module.weight
    if torch.compiler.is_compiling() or hidden.dtype != weight.dtype:
        found: Tensor = type(module).forward(module, hidden)
        return found
    return rms_norm(hidden, weight.shape, weight, module.variance_epsilon).to(hidden.dtype)
