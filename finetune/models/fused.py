"""What lies between a base's products in few operations: RMSNorms and rotary positions, a dozen small kernels each.

What is computed is rounded once, not after every operation; in float32 it is the same to rounding. Formulas that are
not these are left alone: each kind of layer is asked for an example first.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from types import MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import Function, once_differentiable
from torch.nn.functional import rms_norm

ROTARY = "apply_rotary_pos_emb"  # transformers' name for it, in the file of each architecture
Pair = tuple[Tensor, Tensor]


@contextlib.contextmanager
def fused(model: nn.Module) -> Iterator[None]:
    """Within, the model's norms and rotary positions take few operations, except where a compiler fuses them."""
    files = {type(module).__module__ for module in model.modules()}
    with contextlib.ExitStack() as stack:
        for name in files:
            if _rotates(file := sys.modules[name]):
                stack.enter_context(_rotating(file))
        stack.enter_context(_norming(model))
        yield


@contextlib.contextmanager
def _norming(model: nn.Module) -> Iterator[None]:
    known: dict[type, bool] = {}
    found: list[Any] = []
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm") and "forward" not in vars(module):
            if type(module) not in known:
                known[type(module)] = _plain(module)
            if known[type(module)]:
                found.append(module)
    for module in found:
        module.forward = MethodType(_normed, module)
    try:
        yield
    finally:
        for module in found:
            del module.forward


@torch.no_grad()
def _plain(module: Any) -> bool:
    """Is it RMSNorm (Zhang and Sennrich 2019, eq. 4), w x / sqrt(mean(x^2) + eps)? Others scale by 1 + w."""
    weight, eps = getattr(module, "weight", None), getattr(module, "variance_epsilon", None)
    if weight is None or eps is None or not weight.is_floating_point() or not weight.any():
        return False
    x = torch.linspace(-1.5, 2.5, weight.numel(), device=weight.device, dtype=weight.dtype)
    x = torch.stack([x, x * eps**0.5])  # of the second, half is eps
    close = 4 * torch.finfo(weight.dtype).eps  # each is rounded twice or thrice
    return torch.allclose(rms_norm(x, weight.shape, weight, eps), type(module).forward(module, x), rtol=close, atol=0)


def _normed(module: Any, hidden: Tensor) -> Tensor:
    """What takes the place of a norm's forward: (..., width) -> (..., width)."""
    weight = module.weight
    if torch.compiler.is_compiling() or hidden.dtype != weight.dtype:
        found: Tensor = type(module).forward(module, hidden)
        return found
    return rms_norm(hidden, weight.shape, weight, module.variance_epsilon).to(hidden.dtype)


@contextlib.contextmanager
def _rotating(file: ModuleType) -> Iterator[None]:
    before = getattr(file, ROTARY)

    def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> Pair:
        """(..., tokens, size) of queries and keys, each turned by its position."""
        alike = q.dtype == k.dtype == cos.dtype and q.shape[-1] == cos.shape[-1]
        if torch.compiler.is_compiling() or not alike:
            found: Pair = before(q, k, cos, sin, unsqueeze_dim)
            return found
        found = _Rotary.apply(q, k, cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim))
        return found

    rotate.fused = True  # type: ignore[attr-defined]
    setattr(file, ROTARY, rotate)
    try:
        yield
    finally:
        setattr(file, ROTARY, before)


def _rotates(file: ModuleType) -> bool:
    """Has it rotary positions (Su et al. 2021, eq. 34) of two halves? Others turn neighbours, or only a part."""
    function = getattr(file, ROTARY, None)
    if function is None or hasattr(function, "fused"):
        return False
    q, k, cos, sin = torch.linspace(-2, 2, 4 * 24, dtype=torch.float64).sin().view(4, 1, 3, 8)
    try:
        found = function(q[None], k[None], cos, sin)
    except (TypeError, RuntimeError):  # it takes something else
        return False
    expected = (_turned(x[None], cos[None], sin[None]) for x in (q, k))
    return all(torch.allclose(a, b, rtol=1e-12, atol=1e-12) for a, b in zip(found, expected, strict=True))


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x cos + (-x_2, x_1) sin of the halves x_1, x_2."""
    half = x.shape[-1] // 2
    found = x * cos
    found[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-1)
    found[..., half:].addcmul_(x[..., :half], sin[..., half:])
    return found


def _turned_back(gradient: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The gradient of x in `_turned`."""
    half = gradient.shape[-1] // 2
    found = gradient * cos
    found[..., :half].addcmul_(gradient[..., half:], sin[..., half:])
    found[..., half:].addcmul_(gradient[..., :half], sin[..., :half], value=-1)
    return found


class _Rotary(Function):
    """Three operations for queries, three for keys; autograd's own backward has forty."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Pair:
        ctx.save_for_backward(cos, sin)
        return _turned(q, cos, sin), _turned(k, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        q, k = (_turned_back(gradient, *ctx.saved_tensors) for gradient in gradients)
        return q, k, None, None
