"""What lies between a base's products in few operations: RMSNorms and rotary positions, a dozen small kernels each.

What is computed is rounded less often; in float32 it is the same to rounding. Formulas that are not these are left
alone: each kind of layer is asked for an example first.
"""

from __future__ import annotations

import contextlib
import inspect
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
            if (file := sys.modules.get(name)) and _rotates(file):
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
    try:
        for module in found:
            module.forward = MethodType(_normed, module)
        yield
    finally:
        for module in found:
            vars(module).pop("forward", None)


@torch.no_grad()
def _plain(module: Any) -> bool:
    """Is it RMSNorm (Zhang and Sennrich 2019, eq. 4), w x / sqrt(mean(x^2) + eps)? Others scale by 1 + w."""
    weight: Any = getattr(module, "weight", None)
    eps = getattr(module, "variance_epsilon", None)
    if eps is None or [name for name, _ in module.named_parameters()] != ["weight"] or not weight.any():
        return False
    x = torch.linspace(-1.5, 2.5, weight.numel(), device=weight.device, dtype=weight.dtype)
    x = torch.stack([x, x * eps**0.5])  # of the second, half is eps
    close = 4 * torch.finfo(weight.dtype).eps  # each is rounded twice or thrice
    with torch.autocast(weight.device.type, enabled=False):
        found, expected = _norm(x, weight, eps), type(module).forward(module, x)
    return found.dtype == expected.dtype and torch.allclose(found, expected, rtol=close, atol=0)


def _normed(module: Any, hidden: Tensor) -> Tensor:
    """What takes the place of a norm's forward: (..., width) -> (..., width)."""
    weight = module.weight
    if torch.compiler.is_compiling() or hidden.dtype != weight.dtype:
        found: Tensor = type(module).forward(module, hidden)
        return found
    return _norm(hidden, weight, module.variance_epsilon)


def _norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """One kernel; autocast, from torch 2.12 on, would make copies in float32 first."""
    with torch.autocast(x.device.type, enabled=False):
        return rms_norm(x, weight.shape, weight, eps)


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

    setattr(file, ROTARY, rotate)
    try:
        yield
    finally:
        setattr(file, ROTARY, before)


def _rotates(file: ModuleType) -> bool:
    """Has it rotary positions (Su et al. 2021, eq. 34) of two halves? Others turn neighbours, or only a part."""
    function: Any = getattr(file, ROTARY, None)
    if getattr(function, "__module__", None) != file.__name__:  # this one's, or a method's
        return False
    q, k, cos, sin = torch.linspace(-2, 2, 4 * 24, dtype=torch.float64).sin().view(4, 1, 3, 8)
    expected = [_turned(x[None], cos[None], sin[None]) for x in (q, k)]
    try:
        takes = [(p.name, p.default) for p in inspect.signature(function).parameters.values()]
        found = function(q[None], k[None], cos, sin)
        same = all(torch.allclose(a, b, rtol=1e-12, atol=1e-12) for a, b in zip(found, expected, strict=True))
    except (TypeError, RuntimeError, ValueError):  # it takes or gives something else
        return False
    given = [(name, inspect.Parameter.empty) for name in ("q", "k", "cos", "sin")]
    return same and takes == [*given, ("unsqueeze_dim", 1)]


def _turned(x: Tensor, cos: Tensor, sin: Tensor, *, back: bool = False) -> Tensor:
    """x cos + (-x_2, x_1) sin of the halves x_1, x_2; `back`: of its gradient, the gradient of x."""
    half = x.shape[-1] // 2
    first, second = sin[..., :half], sin[..., half:]
    if back:
        first, second = second, first
    sign = 1 if back else -1
    found = x * cos
    found[..., :half].addcmul_(x[..., half:], first, value=sign)
    found[..., half:].addcmul_(x[..., :half], second, value=-sign)
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
        saved = ctx.saved_tensors  # read once: recomputed activations are there but once
        q, k = (_turned(gradient, *saved, back=True) for gradient in gradients)
        return q, k, None, None
