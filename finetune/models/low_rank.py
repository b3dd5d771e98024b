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
    found, inner = _sum(x.reshape(-1, x.shape[-1]), None if weight is None else weight.t(), a.t(), b.t(), bias)
    return found.view(*x.shape[:-1], len(b)), inner


def _backward(gradient: Tensor, saved: Saved, *, onwards: bool) -> tuple[Tensor | None, Tensor, Tensor]:
    """Gradients of x, if it goes `onwards`, of A and of B."""
    x, inner, weight, a, b = saved
    rows, gradient = x.reshape(-1, x.shape[-1]), gradient.reshape(-1, len(b))
    found, g = _sum(gradient, weight, b, a) if onwards else (None, gradient @ b)
    return None if found is None else found.view_as(x), g.t() @ rows, gradient.t() @ inner


def _sum(rows: Tensor, m: Tensor | None, d: Tensor, u: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(tokens, out), `rows` M + (`rows` D) U + bias, and `rows` D (tokens, rank); M may have room, see `low_rank`."""
    (width, rank), outs = d.shape, u.shape[1]
    if m is not None and m.shape[1] > outs and bias is None:  # [M D]
        both = rows @ m[:, : outs + rank]
        inner = both[:, outs:].contiguous()
        return torch.addmm(both[:, :outs], inner, u), inner
    inner = rows @ d
    if m is None:
        return inner @ u, inner
    if len(m) > width:  # [M; U]
        rows, m = torch.cat([rows, inner], 1), m[: width + rank]
        return rows @ m if bias is None else torch.addmm(bias, rows, m), inner
    m = m[:, :outs]
    return (rows @ m if bias is None else torch.addmm(bias, rows, m)).addmm_(inner, u), inner


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
_product = torch.library.custom_op(
    "finetune::low_rank",
    _forward,
    mutates_args=(),
    schema="(Tensor x, Tensor? w, Tensor? bias, Tensor a, Tensor b) -> (Tensor, Tensor)",
)


@torch.library.custom_op(
    "finetune::low_rank_backward",
    mutates_args=(),
    schema="(Tensor y, Tensor x, Tensor xa, Tensor? w, Tensor a, Tensor b, bool onwards) -> (Tensor, Tensor, Tensor)",
)
def _gradients(gradient: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    *saved, onwards = rest
    x, a, b = _backward(gradient, saved, onwards=onwards)  # type: ignore[arg-type]
    return gradient.new_empty(0) if x is None else x, a, b


@_product.register_fake
def _(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    *_, a, b = rest
    return x.new_empty(*x.shape[:-1], b.shape[0]), x.new_empty(prod(x.shape[:-1]), a.shape[0])


@_gradients.register_fake
def _(gradient: Tensor, x: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    *_, a, b, onwards = rest
    return x.new_empty(x.shape if onwards else 0), torch.empty_like(a), torch.empty_like(b)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, _, a, b = inputs
    ctx.save_for_backward(x, output[1], weight, a, b)


def _back(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    onwards = ctx.needs_input_grad[0]
    x, a, b = _gradients(gradient, *ctx.saved_tensors, onwards)
    return x if onwards else None, None, None, a, b


_product.register_autograd(_back, setup_context=_keep)
