"""Which attention by rows is the fastest here, of those that give the same."""

from __future__ import annotations

import functools
import logging
from collections.abc import Collection
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from finetune.models import attention, flash

NEAR = 1e-2  # of a norm: how far two kernels in bfloat16 may be apart; each is 3e-3 from float32 (measured)
PREFIX = 8  # tokens, to try keys that no query is

log = logging.getLogger("finetune")


def fastest(model: Any, *, longest: int, rows: Collection[int]) -> str:
    """Name of the attention for packs of so many rows, of at most `longest` tokens.

    That is flash-attn-4 where it is installed, the GPU is of its kind, and it need not give the same bits each time. If
    it then fails, or gives random rows other outputs or gradients than torch's attention, a warning says so.
    """
    device, config = next(model.parameters()).device, model.config.get_text_config()
    heads = config.num_attention_heads
    key_heads = getattr(config, "num_key_value_heads", None) or heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    if not _meant_for(device) or torch.are_deterministic_algorithms_enabled():
        return attention.NAME
    try:
        sizes = {(number, more) for number in (min(rows), max(rows)) for more in (0, PREFIX)}
        far = max(_apart((heads, key_heads, size), device, longest=longest, rows=n, more=m) for n, m in sizes)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # of somebody else's compiler
        if not isinstance(error, ModuleNotFoundError) or not (error.name or "").startswith("flash_attn"):
            log.warning("flash-attn-4 is installed and fails, so torch's own attention is used: %r", error)
        return attention.NAME
    if far > NEAR:
        log.warning("flash-attn-4 is installed and %.2g of a norm off, so torch's own attention is used", far)
        return attention.NAME
    return flash.NAME


def _meant_for(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


@functools.cache
def _apart(heads: tuple[int, int, int], device: torch.device, *, longest: int, rows: int, more: int) -> float:
    """Of a norm, the most that the two differ by on random rows, with so many `more` keys each.

    `heads` are those of the queries, those of the keys, and their size. The last row is empty, as fillings may be.
    """
    lengths = ([longest, longest // 2] + rows * [1])[: rows - 1]
    bounds = torch.tensor([0, *accumulate(lengths), sum(lengths)], dtype=torch.int32, device=device)
    key_bounds = bounds + more * torch.arange(len(bounds), dtype=torch.int32, device=device)
    options: dict[str, Any] = {"cu_seq_lens_q": bounds, "cu_seq_lens_k": key_bounds}
    options |= {"max_length_q": longest, "max_length_k": longest + more}
    generator = torch.Generator(device).manual_seed(0)
    num_heads, num_key_heads, size = heads

    def draw(number: int, tokens: int) -> Tensor:
        drawn = torch.randn(1, number, tokens, size, device=device, generator=generator)
        return drawn.to(torch.bfloat16).requires_grad_()

    tokens, keys = sum(lengths), sum(lengths) + more * rows
    q, k, v = draw(num_heads, tokens), draw(num_key_heads, keys), draw(num_key_heads, keys)
    slope = draw(tokens, num_heads).detach()

    def found(attend: Any) -> list[Tensor]:
        out, _ = attend(nn.Module(), q, k, v, None, **options)
        return [out, *torch.autograd.grad(out, (q, k, v), slope)]

    theirs = found(flash.flash_attention)  # first: where it is missing, nothing else is computed
    ours = found(attention.packed_attention)
    far = [(a - b).float().norm() / a.float().norm() for a, b in zip(ours, theirs, strict=True)]
    return torch.stack(far).nan_to_num(torch.inf).max().item()
