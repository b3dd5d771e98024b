"""The float32 factors of many LoRA layers, cast to the precision of a forward pass at once; and their gradients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function


@dataclass(frozen=True, eq=False)
class Stack:
    """Equal joints of layers, one in every block: a joint's A below each other, its B along a diagonal."""

    factors: tuple[nn.Parameter, ...]  # every A (rank, in) of the first joint, of the second, ...; then every B
    num_joints: int
    outs: tuple[slice, ...]  # each layer's place in a joint
    ranks: tuple[slice, ...]
    scales: tuple[float, ...]

    def blocks(self, b: Tensor) -> list[Tensor]:
        """Of B (joints, out, rank) each layer's part."""
        return [b[:, out, rank] for out, rank in zip(self.outs, self.ranks, strict=True)]


def cast(stack: Stack, *, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    """Each joint's A and scaled B."""
    a, b = _Cast.apply(stack, dtype, *stack.factors)
    return list(zip(a.unbind(), b.unbind(), strict=True))


class _Cast(Function):
    """Few operations for all joints; the factors' gradients are float32."""

    @staticmethod
    def forward(ctx: Any, stack: Stack, dtype: torch.dtype, *factors: Tensor) -> tuple[Tensor, Tensor]:
        ctx.stack = stack
        half, together = len(factors) // 2, len(stack.outs)
        a = torch.cat(factors[:half]).to(dtype).view(stack.num_joints, -1, factors[0].shape[1])
        b = a.new_zeros(stack.num_joints, stack.outs[-1].stop, stack.ranks[-1].stop)
        for place, (block, scale) in enumerate(zip(stack.blocks(b), stack.scales, strict=True)):
            block.copy_(torch.stack(factors[half + place :: together]) * scale)
        return a, b

    @staticmethod
    def backward(ctx: Any, for_a: Tensor, for_b: Tensor) -> tuple[Tensor | None, ...]:
        stack: Stack = ctx.stack
        sizes = [rank.stop - rank.start for rank in stack.ranks] * stack.num_joints
        parts = [
            (block.float() * scale).unbind() for block, scale in zip(stack.blocks(for_b), stack.scales, strict=True)
        ]
        found = [
            *for_a.float().flatten(0, 1).split(sizes),
            *(part for joint in zip(*parts, strict=True) for part in joint),
        ]
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            return None, None, *found  # several processes wait for autograd's own accumulation
        _add(stack.factors, found)
        return (None,) * (2 + len(found))


def _add(weights: Sequence[nn.Parameter], gradients: Sequence[Tensor]) -> None:
    """Add to `.grad`, all at once: autograd launches a kernel for each of them."""
    there = [(w.grad, g) for w, g in zip(weights, gradients, strict=True) if w.grad is not None]
    for weight, gradient in zip(weights, gradients, strict=True):
        if weight.grad is None:
            weight.grad = gradient
    if there:
        torch._foreach_add_([old for old, _ in there], [new for _, new in there])
