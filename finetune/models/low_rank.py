"""A frozen linear layer with a low-rank product beside it, y = x W^T + bias + (x A^T) B^T, and its gradients.

Two or three products forward and four or five backward, added where they lie: PEFT's own forward pass also casts input,
weights and gradients between precisions in every layer, and adds in kernels of their own.
"""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from finetune.models.beside import Beside

Saved = tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor]  # x, x A^T (tokens, rank), W, A, B


def low_rank(x: Tensor, weight: Tensor | None, bias: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    """(..., in) -> (..., out) with W (out, in), A (rank, in) and B (out, rank), in A's precision; no W is W = 0.

    W may have room, where B stands behind its columns or A below its rows: then one product does for two.
    """
    x = x.to(a.dtype)
    weight, bias = (None if w is None else w.to(a.dtype) for w in (weight, bias))
    if torch.compiler.is_compiling():
        found: Tensor = _product(x, weight, bias, a, b)[0]
        return found
    return _LowRank.apply(x, weight, bias, a, b)


def _forward(x: Tensor, weight: Tensor | None, bias: Tensor | None, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """(..., out), and x A^T (tokens, rank)."""
    rows, m = x.reshape(-1, x.shape[-1]), None if weight is None else weight.t()
    inner, wide = _inner(rows, m, a.t(), outs=len(b), bias=bias)
    return _sum(rows, m, b.t(), inner=inner, wide=wide, bias=bias).view(*x.shape[:-1], len(b)), inner


def _backward(gradient: Tensor, saved: Saved, *, onwards: bool) -> tuple[Tensor | None, Tensor, Tensor]:
    """Gradients of x, if it goes `onwards`, of A and of B, which alone fill no GPU."""
    x, inner, weight, a, b = saved
    rows, gradient = x.reshape(-1, x.shape[-1]), gradient.reshape(-1, len(b))
    beside = Beside(gradient.device)
    for_b = beside(lambda: gradient.t() @ inner)
    g, wide = _inner(gradient, weight if onwards else None, b, outs=x.shape[-1])
    for_a = beside(lambda: g.t() @ rows)
    for_x = _sum(gradient, weight, a, inner=g, wide=wide).view_as(x) if onwards else None
    beside.join()
    return for_x, for_a, for_b


def _inner(
    rows: Tensor, m: Tensor | None, d: Tensor, *, outs: int, bias: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """`rows` D (tokens, rank); with it `rows` M (tokens, out) where M's columns are followed by D's, see `low_rank`."""
    if m is None or not _wide(m.shape[1], outs, bias):
        return rows @ d, None
    both = rows @ m[:, : outs + d.shape[1]]
    return both[:, outs:].clone(memory_format=torch.contiguous_format), both[:, :outs]  # an operator's own, each


def _sum(
    rows: Tensor, m: Tensor | None, u: Tensor, *, inner: Tensor, wide: Tensor | None, bias: Tensor | None = None
) -> Tensor:
    """(tokens, out), `rows` M + `inner` U + bias; M's rows may be followed by U's, see `low_rank`."""
    if m is None:
        return inner @ u
    if wide is not None:
        return wide.addmm_(inner, u)
    if len(m) > rows.shape[1]:  # [M; U]
        rows, m = torch.cat([rows, inner], 1), m[: rows.shape[1] + len(u)]
        return rows @ m if bias is None else torch.addmm(bias, rows, m)
    m = m[:, : u.shape[1]]
    return (rows @ m if bias is None else torch.addmm(bias, rows, m)).addmm_(inner, u)


def _wide(columns: int, outs: int, bias: Tensor | None = None) -> bool:
    """Does one product with all columns give both?"""
    return columns > outs and bias is None


class _LowRank(Function):
    """`low_rank` where Python runs it."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        found, inner = _forward(*inputs)
        x, weight, _, a, b = inputs
        ctx.save_for_backward(x, inner, weight, a, b)
        return found

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, a, b = _backward(gradient, ctx.saved_tensors, onwards=ctx.needs_input_grad[0])
        return x, None, None, a, b


# A compiled layer calls these as they are: of a product that is added to another, a compiler makes copy and product.
# The compiler's cache on disk knows them by name: with other strides of what they return they need other names.
_product = torch.library.custom_op(
    "finetune::linear_low_rank",
    _forward,
    mutates_args=(),
    schema="(Tensor x, Tensor? w, Tensor? bias, Tensor a, Tensor b) -> (Tensor, Tensor)",
)


@torch.library.custom_op(
    "finetune::linear_low_rank_backward",
    mutates_args=(),
    schema="(Tensor y, Tensor x, Tensor xa, Tensor? w, Tensor a, Tensor b, bool onwards) -> (Tensor, Tensor, Tensor)",
)
def _gradients(gradient: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    *saved, onwards = rest
    x, a, b = _backward(gradient, saved, onwards=onwards)  # type: ignore[arg-type]
    return gradient.new_empty(0) if x is None else x, a, b


@_product.register_fake
def _(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    weight, bias, a, b = rest
    room = len(a) if weight is not None and _wide(len(weight), len(b), bias) else 0
    return _like(x, len(b), room=room), x.new_empty(prod(x.shape[:-1]), len(a))


@_gradients.register_fake
def _(gradient: Tensor, x: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    _, weight, a, b, onwards = rest
    room = len(a) if weight is not None and _wide(weight.shape[1], x.shape[-1]) else 0
    found = _like(x, x.shape[-1], room=room) if onwards else x.new_empty(0)
    return found, torch.empty_like(a), torch.empty_like(b)


def _like(x: Tensor, outs: int, *, room: int) -> Tensor:
    """(..., outs) with x's first sizes, and that much room between its rows."""
    return x.new_empty(prod(x.shape[:-1]), outs + room)[:, :outs].view(*x.shape[:-1], outs)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, _, a, b = inputs
    ctx.save_for_backward(x, output[1], weight, a, b)


def _back(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    onwards = ctx.needs_input_grad[0]
    x, a, b = _gradients(gradient, *ctx.saved_tensors, onwards)
    return x if onwards else None, None, None, a, b


_product.register_autograd(_back, setup_context=_keep)
