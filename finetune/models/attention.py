"""Padding-free attention: rows lie one after another in one sequence, and each attends to itself only.

Registered with transformers' `AttentionInterface` as "packed"; no mask is built for it, and it receives the row
boundaries that the forward pass was given as `cu_seq_lens_q` and `max_length_q`; those of the keys differ from them
where a prefix stands before each row (finetune.models.prefixes).
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

NAME = "packed"
KNOWN = frozenset(inspect.signature(varlen_attn).parameters)  # asked once: it takes as long as a kernel's launch


def packs(device: torch.device) -> bool:
    """Can rows be packed on this device? On a GPU, attention by row bounds needs compute capability 8.0."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 0)


@contextlib.contextmanager
def attending(model: Any, name: str) -> Iterator[None]:
    """Within, the model attends by the function of that name."""
    before = model.config._attn_implementation
    model.config._attn_implementation = name
    try:
        yield
    finally:
        model.config._attn_implementation = before


def packing(model: Any) -> contextlib.AbstractContextManager[None]:
    """Within, the model attends by rows."""
    return attending(model, NAME)


def packed_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """Causal attention within rows: query (1, heads, tokens, size) -> (1, tokens, heads, size); no dropout."""
    query, key = query.to(value.dtype), key.to(value.dtype)  # rotary embeddings leave autocast's precision
    bounds, key_bounds, scale = options["cu_seq_lens_q"], options["cu_seq_lens_k"], options.get("scaling")
    if query.is_cuda and query.dtype in (torch.bfloat16, torch.float16):
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # (tokens, heads, size)
        longest, most_keys = options["max_length_q"], options["max_length_k"]
        out = varlen_attn(q, k, v, bounds, key_bounds, longest, most_keys, scale=scale, **_causal(q, k))
        assert isinstance(out, Tensor)  # a tuple only when auxiliary outputs are asked for
        return out[None], None
    grouped = query.shape[1] != key.shape[1]
    queries, keys = bounds.diff().tolist(), key_bounds.diff().tolist()
    parts = []
    # Splitting has one backward operation for all rows; slices had one each, over all tokens.
    for q, k, v in zip(query.split(queries, 2), key.split(keys, 2), value.split(keys, 2), strict=True):
        mask = None if k.shape[2] == q.shape[2] else causal(q.shape[2], k.shape[2], device=query.device)
        parts.append(
            scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, scale=scale, enable_gqa=grouped)
        )
    return torch.cat(parts, dim=2).transpose(1, 2), None


def causal(num_queries: int, num_keys: int, *, device: torch.device) -> Tensor:
    """True (queries, keys) where a query sees a key, the last query the last key."""
    seen = torch.ones(num_queries, num_keys, dtype=torch.bool, device=device)
    return seen.tril(num_keys - num_queries)


def _causal(query: Tensor, key: Tensor) -> dict[str, Any]:
    """`varlen_attn`'s arguments, which change with torch: is_causal (2.10), window_size (2.11), enable_gqa (2.12)."""
    causal: dict[str, Any] = {"window_size": (-1, 0)} if "window_size" in KNOWN else {"is_causal": True}
    if "enable_gqa" in KNOWN and query.shape[1] != key.shape[1]:
        causal["enable_gqa"] = True
    return causal


AttentionInterface.register(NAME, packed_attention)
