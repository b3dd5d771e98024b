"""Keys and values that stand before every row of a base: in training, in a pack, and in the cache when it generates.

Who calls the base never sees them: masks, positions and row boundaries are given, and logits returned, without them.
With a KV cache they are its first entries. Without one (training, also with recomputed activations) every attention
receives, in the cache's place, an object whose `update` puts them before the keys and values of the forward pass. It
finds that object in itself: a compiled layer that chose by its own number would be compiled again for every layer.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import DynamicCache
from transformers.models.bloom.modeling_bloom import build_alibi_tensor

from finetune.models.attention import causal

States = Callable[[], Tensor]  # () -> (layers, 2, key heads, tokens, size): keys as they are cached, and values

ORDER = "prefix_order"  # of a pack: what reaches every attention beside the pack's bounds


def insert(model: Any, attentions: Sequence[nn.Module], *, states: States, num_tokens: int) -> None:
    """Put `num_tokens` virtual tokens before every row; `attentions` are those of the model's blocks, first to last.

    `states` is asked once a pass.
    """

    def enter(base: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        ids = next(x for x in (*args[:1], kwargs.get("input_ids"), kwargs.get("inputs_embeds")) if x is not None)
        cache = kwargs["past_key_values"] = _cache(base, kwargs)
        if cache is None:
            for module, both in zip(attentions, states(), strict=True):
                module.before = both
        else:
            for module in attentions:
                module.before = None  # type: ignore[assignment]  # nothing of the pass before is kept
            if not cache.get_seq_length():
                _fill(cache, states(), num_rows=len(ids), dtype=base.dtype)
        return args, kwargs | _shifted(base, kwargs, ids=ids, num_tokens=num_tokens)

    def attend(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        name = "layer_past" if "layer_past" in kwargs else "past_key_values"
        if kwargs.get(name) is None:
            if "cu_seq_lens_q" not in kwargs:
                kwargs |= _around(kwargs, hidden=args[0] if args else kwargs["hidden_states"], num_tokens=num_tokens)
            kwargs[name] = _Before(module.before, kwargs.pop(ORDER, None))
        return args, kwargs

    model.register_forward_pre_hook(enter, with_kwargs=True)
    for module in attentions:
        module.register_forward_pre_hook(attend, with_kwargs=True)


@dataclass(frozen=True)
class _Before:
    """Stands where an attention expects its cache."""

    states: Tensor  # (2, key heads, virtual tokens, size)
    order: Tensor | None  # of a pack: where each token lies in (the prefixes of all rows, the pack)

    def update(self, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
        """Keys and values (rows, heads, tokens, size) with the prefix before them."""
        first, second = (self._join(prefix, x) for prefix, x in zip(self.states, (key, value), strict=True))
        return first, second

    def _join(self, prefix: Tensor, x: Tensor) -> Tensor:
        prefix = prefix.to(x.dtype)
        if self.order is None:
            return torch.cat([prefix.expand(len(x), -1, -1, -1), x], dim=2)
        rows = (len(self.order) - x.shape[2]) // prefix.shape[1]
        return torch.cat([prefix.repeat(1, rows, 1)[None], x], dim=2).index_select(2, self.order)


def _cache(base: Any, kwargs: dict[str, Any]) -> Any:
    """The cache of this pass, a new one where transformers would make one, or None."""
    if base.training and base.is_gradient_checkpointing:
        return None
    use = kwargs.get("use_cache")
    if kwargs.get("past_key_values") is None and (base.config.use_cache if use is None else use):
        return DynamicCache(config=base.config)
    return kwargs.get("past_key_values")


def _fill(cache: Any, states: Tensor, *, num_rows: int, dtype: torch.dtype) -> None:
    """Make the prefix (layers, 2, key heads, tokens, size) the first entries of every row's cache."""
    for layer, both in enumerate(states):
        key, value = both.to(dtype)[:, None].expand(-1, num_rows, -1, -1, -1)
        cache.update(key, value, layer)


def _shifted(base: Any, kwargs: dict[str, Any], *, ids: Tensor, num_tokens: int) -> dict[str, Any]:
    """Positions and a pack's bounds with the prefix; with a cache the mask, which else every attention widens itself.

    A base without position ids (BLOOM) takes them from its mask, or from the length of its cache.
    """
    found: dict[str, Any] = {}
    mask, positions, cache = (kwargs.get(name) for name in ("attention_mask", "position_ids", "past_key_values"))
    if cache is not None and mask is not None:
        found["attention_mask"] = wider(mask, num_tokens)
    if positions is None and cache is None:
        positions = torch.arange(ids.shape[1], device=ids.device)[None]
    if (bounds := kwargs.get("cu_seq_lens_q")) is not None:
        found |= {"cu_seq_lens_k": widened(bounds, num_tokens), "max_length_k": kwargs["max_length_q"] + num_tokens}
        found[ORDER], _ = order(bounds, num_real=ids.shape[1], num_tokens=num_tokens)
    if positions is not None and "position_ids" in inspect.signature(base.forward).parameters:
        found["position_ids"] = positions + num_tokens
    return found


def _around(kwargs: dict[str, Any], *, hidden: Tensor, num_tokens: int) -> dict[str, Any]:
    """The mask and ALiBi of an attention whose keys begin with the prefix."""
    mask, tokens = kwargs.get("attention_mask"), hidden.shape[1]
    if mask is None:
        mask = causal(tokens, num_tokens + tokens, device=hidden.device)[None, None]
    else:
        mask = wider(mask, num_tokens)
    found: dict[str, Any] = {"attention_mask": mask}
    if (alibi := kwargs.get("alibi")) is not None:  # (rows * heads, 1, tokens)
        heads = len(alibi) // len(hidden)
        slopes = build_alibi_tensor(torch.ones(1, num_tokens + 1, device=alibi.device), heads, alibi.dtype)
        before = slopes[..., :-1] - slopes[..., -1:]  # only differences of positions count
        found["alibi"] = torch.cat([before.repeat(len(hidden), 1, 1), alibi], dim=-1)
    return found


def wider(mask: Tensor, num_tokens: int) -> Tensor:
    """A mask, also one that is added to attention's scores, in which every row sees `num_tokens` more before it."""
    return pad(mask, (num_tokens, 0), value=not mask.is_floating_point())


def widened(bounds: Tensor, num_tokens: int) -> Tensor:
    """Bounds (rows + 1,) of a pack in which `num_tokens` more stand before every row."""
    return bounds + num_tokens * torch.arange(len(bounds), dtype=bounds.dtype, device=bounds.device)


def order(bounds: Tensor, *, num_real: int, num_tokens: int) -> tuple[Tensor, Tensor]:
    """Index (rows * virtual + real tokens,) into (all rows' prefixes, pack) that puts a prefix before each row.

    And each of these tokens' place in its row, the prefix counted.
    """
    rows = len(bounds) - 1
    start = bounds.long()
    joined = widened(start, num_tokens)
    place = torch.arange(num_real + rows * num_tokens, device=bounds.device)
    row = torch.searchsorted(joined, place, right=True) - 1
    offset = place - joined[row]
    real = rows * num_tokens + start[row] + offset - num_tokens
    return torch.where(offset < num_tokens, row * num_tokens + offset, real), offset
