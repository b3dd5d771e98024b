"""Padding-free attention: rows lie one after another in one sequence, and each attends to itself only.

Registered with transformers' `AttentionInterface` as "packed", and as "packed-flash" by the package flash-attn-4; no
mask is built for it, and it receives the row boundaries that the forward pass was given as `cu_seq_lens_q` and
`max_length_q`; those of the keys differ from them where a prefix stands before each row (finetune.models.prefixes).
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import logging
from collections.abc import Iterator
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from finetune.models.flash import flash_rows

NAME, FLASH = "packed", "packed-flash"
KNOWN = frozenset(inspect.signature(varlen_attn).parameters)  # asked once: it takes as long as a kernel's launch
NEAR = 1e-2  # of a norm: how far two kernels in bfloat16 may be apart; each is 3e-3 from float32 (measured)

log = logging.getLogger("finetune")


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


def packing(model: Any, *, flash: bool = False) -> contextlib.AbstractContextManager[None]:
    """Within, the model attends by rows; if `flash`, by the package flash-attn-4 where it is there and right."""
    if not flash:
        return attending(model, NAME)
    config = model.config
    heads, device = config.num_attention_heads, next(model.parameters()).device
    key_heads = getattr(config, "num_key_value_heads", None) or heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    able = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
    able &= not torch.are_deterministic_algorithms_enabled()
    return attending(model, FLASH if able and flash_agrees(heads, key_heads, size, device) else NAME)


@functools.cache
def flash_agrees(heads: int, key_heads: int, size: int, device: torch.device) -> bool:
    """Does flash-attn-4 give what "packed" gives, and its gradients? If it is there and does not, a warning says so."""
    try:
        far = max(_apart(heads, key_heads, size, device, more=more) for more in (0, 8))
    except Exception as error:  # of somebody else's compiler
        if isinstance(error, ModuleNotFoundError) and (error.name or "").startswith("flash_attn"):
            return False
        log.warning("flash-attn-4 is installed and fails, so torch's own attention is used: %s", error)
        return False
    if far > NEAR:
        log.warning("flash-attn-4 is installed and %.2g of a norm off, so torch's own attention is used", far)
    return far <= NEAR


def _apart(heads: int, key_heads: int, size: int, device: torch.device, *, more: int) -> float:
    """Of a norm, the most that flash-attn-4 and "packed" differ by on random rows, with so many `more` keys each.

    Raises ModuleNotFoundError where the package is missing, and whatever it raises itself.
    """
    lengths = (70, 1, 200, 0)
    bounds = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)
    rows = torch.arange(len(bounds), dtype=torch.int32, device=device)
    options = {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds + more * rows}
    longest = {"max_length_q": max(lengths), "max_length_k": max(lengths) + more}
    generator = torch.Generator(device).manual_seed(0)

    def draw(number: int, tokens: int) -> Tensor:
        drawn = torch.randn(1, number, tokens, size, device=device, generator=generator)
        return drawn.to(torch.bfloat16).requires_grad_()

    keys = sum(lengths) + more * len(lengths)
    q, k, v = draw(heads, sum(lengths)), draw(key_heads, keys), draw(key_heads, keys)
    slope = torch.randn(1, sum(lengths), heads, size, device=device, generator=generator).to(torch.bfloat16)
    found = []
    for attention in (packed_attention, flash_attention):
        out, _ = attention(nn.Module(), q, k, v, None, **options, **longest)
        found.append([out, *torch.autograd.grad(out, (q, k, v), slope)])
    far = [(a - b).float().norm() / a.float().norm() for a, b in zip(*found, strict=True)]
    return torch.stack(far).nan_to_num(torch.inf).max().item()


def flash_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """As `packed_attention`, by the package flash-attn-4."""
    q, k, v = _flat(query, key, value)
    return flash_rows(q, k, v, *_bounds(options), options.get("scaling") or q.shape[-1] ** -0.5)[None], None


def packed_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """Causal attention within rows: query (1, heads, tokens, size) -> (1, tokens, heads, size); no dropout."""
    scale = options.get("scaling")
    if query.is_cuda and value.dtype in (torch.bfloat16, torch.float16):
        q, k, v = _flat(query, key, value)
        out = varlen_attn(q, k, v, *_bounds(options), scale=scale, **_causal(q, k))
        assert isinstance(out, Tensor)  # a tuple only when auxiliary outputs are asked for
        return out[None], None
    query, key = query.to(value.dtype), key.to(value.dtype)
    grouped = query.shape[1] != key.shape[1]
    queries, keys = (bounds.diff().tolist() for bounds in _bounds(options)[:2])
    parts = []
    # Splitting has one backward operation for all rows; slices had one each, over all tokens.
    for q, k, v in zip(query.split(queries, 2), key.split(keys, 2), value.split(keys, 2), strict=True):
        mask = None if k.shape[2] == q.shape[2] else causal(q.shape[2], k.shape[2], device=query.device)
        parts.append(
            scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, scale=scale, enable_gqa=grouped)
        )
    return torch.cat(parts, dim=2).transpose(1, 2), None


def _flat(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Each (tokens, heads, size), in one precision: rotary embeddings leave autocast's."""
    q, k, v = (x[0].transpose(0, 1).to(value.dtype) for x in (query, key, value))
    return q, k, v


def _bounds(options: dict[str, Any]) -> tuple[Tensor, Tensor, int, int]:
    """Of the rows' queries and keys, and the most of each."""
    return options["cu_seq_lens_q"], options["cu_seq_lens_k"], options["max_length_q"], options["max_length_k"]


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
AttentionInterface.register(FLASH, flash_attention)
