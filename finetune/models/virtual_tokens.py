"""Trained embeddings that stand before every row of a base: in training, in a pack, and when it generates.

Who calls the base gives ids, masks, positions and row boundaries without them. Logits of a padded pass come with
theirs first; those of a pack are of the positions asked for.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from finetune.models.prefixes import order, widened, wider


def insert(model: Any, *, embeddings: Callable[[], Tensor], num_tokens: int) -> None:
    """Put the virtual tokens (`num_tokens`, hidden) that `embeddings` returns before every row."""
    positioned = "position_ids" in inspect.signature(model.forward).parameters

    def enter(base: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if args:
            kwargs["input_ids"] = args[0]
        if kwargs.get("cu_seq_lens_q") is not None:
            kwargs |= _packed(base, kwargs, embeddings())
        else:
            kwargs |= _padded(base, kwargs, embeddings, num_tokens=num_tokens, positioned=positioned)
        return args[1:] and (None, *args[1:]), kwargs

    model.register_forward_pre_hook(enter, with_kwargs=True)


def _embedded(base: Any, kwargs: dict[str, Any]) -> Tensor:
    """(rows, tokens, hidden) of what the caller gave."""
    given = kwargs.get("inputs_embeds")
    found: Tensor = base.get_input_embeddings()(kwargs["input_ids"]) if given is None else given
    return found


def _padded(
    base: Any, kwargs: dict[str, Any], embeddings: Callable[[], Tensor], *, num_tokens: int, positioned: bool
) -> dict[str, Any]:
    """The first pass of rows gets the virtual tokens; in later ones they are in the cache."""
    cache, found = kwargs.get("past_key_values"), dict[str, Any]()
    first = cache is None or not cache.get_seq_length()
    if (mask := kwargs.get("attention_mask")) is not None:
        found["attention_mask"] = wider(mask, num_tokens)
    if positioned and (positions := kwargs.get("position_ids")) is not None:
        before = torch.arange(num_tokens if first else 0, device=positions.device).expand(len(positions), -1)
        found["position_ids"] = torch.cat([before, positions + num_tokens], dim=1)
    if first:
        embedded = _embedded(base, kwargs)
        before = embeddings().to(embedded.dtype).expand(len(embedded), -1, -1)
        found |= {"input_ids": None, "inputs_embeds": torch.cat([before, embedded], dim=1)}
    return found


def _packed(base: Any, kwargs: dict[str, Any], virtual: Tensor) -> dict[str, Any]:
    """Virtual tokens before each row of a pack; boundaries, positions and the logits to keep move with them."""
    bounds, kept, num_tokens = kwargs["cu_seq_lens_q"], kwargs["logits_to_keep"], len(virtual)
    rows = len(bounds) - 1
    embedded = _embedded(base, kwargs)
    both = torch.cat([virtual.to(embedded.dtype).repeat(rows, 1)[None], embedded], dim=1)
    place, offset = order(bounds, num_real=embedded.shape[1], num_tokens=num_tokens)
    joined = widened(bounds, num_tokens)
    longest = kwargs["max_length_q"] + num_tokens
    return {
        "input_ids": None,
        "inputs_embeds": both.index_select(1, place),
        "position_ids": offset[None],
        "logits_to_keep": kept + num_tokens * torch.searchsorted(bounds, kept.to(bounds.dtype), right=True),
        "cu_seq_lens_q": joined,
        "cu_seq_lens_k": joined,
        "max_length_q": longest,
        "max_length_k": longest,
    }
