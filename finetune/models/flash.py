"""Causal attention by row bounds of the package flash-attn-4, which takes about half of the time of torch's own.

Tensors of rows are (tokens, heads, size) and contiguous; keys and values may have fewer heads. Bounds are (rows + 1).
Its kernels are compiled when they are called first, for some 6 s a size of heads, and kept in the cache folder.
"""

from __future__ import annotations

import contextlib
import functools
import os
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from finetune.models.sources import cache_folder

NAME = "packed-fa4"  # one with "flash" in it is transformers' own, with rules for masks


def flash_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """As `packed_attention` (finetune.models.attention).

    Raises ModuleNotFoundError where the package is missing; an older flash-attn of the same name has no such part.
    """
    # Outside of the operator, where a compiler makes one copy of it, for the gradients too.
    q, k, v = [x[0].transpose(0, 1).to(value.dtype).contiguous() for x in (query, key, value)]
    bounds = [options[name] for name in ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")]
    scale = options.get("scaling") or query.shape[-1] ** -0.5
    found: Tensor = _rows(q, k, v, *bounds, scale)[0]
    return found[None], None


@functools.cache
def _kernels() -> tuple[Any, Any]:
    """The package's attention and its gradients; the second has no public name, torch calls it by this one too."""
    os.environ.setdefault("FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED", "1")
    folder = cache_folder()
    with contextlib.suppress(OSError):  # without a cache folder the package keeps them where it would by itself
        folder.mkdir(parents=True, exist_ok=True)
        os.environ.setdefault("FLASH_ATTENTION_CUTE_DSL_CACHE_DIR", str(folder / "flash-attn-4"))
    from flash_attn.cute.interface import _flash_attn_bwd, flash_attn_varlen_func

    return flash_attn_varlen_func, _flash_attn_bwd


def _options(bounds: Tensor, key_bounds: Tensor, longest: int, most_keys: int, scale: float) -> dict[str, Any]:
    rows = {"cu_seqlens_q": bounds, "cu_seqlens_k": key_bounds, "max_seqlen_q": longest, "max_seqlen_k": most_keys}
    return {**rows, "softmax_scale": scale, "causal": True}


@torch.library.custom_op(
    "finetune::flash_rows",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor qb, Tensor kb, int mq, int mk, float scale) -> (Tensor, Tensor)",
)
def _rows(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    found, exponents, *_ = _kernels()[0](q, k, v, **_options(*rest), return_lse=True)
    return found, exponents


@torch.library.custom_op(
    "finetune::flash_rows_backward",
    mutates_args=(),
    schema="(Tensor y, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor qb, Tensor kb, int mq, int mk, "
    "float scale) -> (Tensor, Tensor, Tensor)",
)
def _gradients(gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    out, exponents, *bounds = rest
    dq, dk, dv, *_ = _kernels()[1](q, k, v, out, gradient, exponents, **_options(*bounds))
    return dq, dk, dv


@_rows.register_fake
def _(q: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32)


@_gradients.register_fake
def _(gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, bounds, key_bounds, *ctx.rest = inputs
    ctx.save_for_backward(q, k, v, *output, bounds, key_bounds)


def _back(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    return *_gradients(gradient.contiguous(), *ctx.saved_tensors, *ctx.rest), None, None, None, None, None


_rows.register_autograd(_back, setup_context=_keep)
AttentionInterface.register(NAME, flash_attention)
