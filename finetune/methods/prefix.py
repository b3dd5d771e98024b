"""Prefix tuning: trained keys and values before every layer, on every base, packed or padded, from random or a text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PrefixTuningConfig
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from finetune.data.rows import Row
from finetune.methods.blocks import attention, blocks
from finetune.methods.method import Method
from finetune.models import prefixes

FILE, KEY = "adapter_model.safetensors", "prompt_embeddings"  # as PEFT names them


class States(nn.Module):
    """The prefix of all layers: (tokens, layers * 2 * width) numbers, a projection of (tokens, width) or themselves."""

    def __init__(self, shape: tuple[int, int, int, int], *, hidden: int | None) -> None:
        super().__init__()
        self.shape = shape  # trained tokens, layers, key heads, size of a head
        tokens, layers, heads, size = shape
        self.width = heads * size
        total = layers * 2 * self.width
        self.embedding = nn.Embedding(tokens, self.width if hidden else total)
        self.transform: nn.Sequential | None = None
        if hidden:
            self.transform = nn.Sequential(nn.Linear(self.width, hidden), nn.Tanh(), nn.Linear(hidden, total))
        self.start: Tensor | None
        self.frozen: Tensor | None
        self.register_buffer("start", None)  # what a text's projection is added to
        self.register_buffer("frozen", None)  # (frozen tokens, layers * 2 * width): stand first

    def flat(self) -> Tensor:
        """(tokens, layers * 2 * width): keys and values, the layers side by side."""
        found = self.embedding.weight if self.transform is None else self.transform(self.embedding.weight)
        if self.start is not None:
            found = found + self.start
        return found if self.frozen is None else torch.cat([self.frozen, found])

    def forward(self) -> Tensor:
        """Keys and values of all layers: (layers, 2, key heads, tokens, size)."""
        with torch.autocast(self.embedding.weight.device.type, enabled=False):  # as it will be saved: in float32
            return self.flat().unflatten(1, (self.shape[1], 2, *self.shape[2:])).permute(1, 2, 3, 0, 4)

    @torch.no_grad()
    def set(self, flat: Tensor) -> None:
        """Start from these keys and values; a projection then adds to them, from 0."""
        if self.transform is None:
            self.embedding.weight.copy_(flat)
        else:
            self.start = flat
            for parameter in self.transform[-1].parameters():
                nn.init.zeros_(parameter)


class Prefix(Method):
    """Li & Liang 2021, arXiv:2101.00190; without projection P-tuning v2, Liu et al. 2021, arXiv:2110.07602; with frozen
    first tokens Cartridges, Eyuboglu et al. 2025, arXiv:2506.06266.

    (m - f) 2 L w numbers for m tokens, f of them frozen, L layers and keys of width w; with a projection through h
    instead m w + w h + h + 2 L w (h + 1). PEFT's forward pass, which is equal, drops a pack's boundaries and fails
    where activations are recomputed.
    """

    replayable = ("graph", "compiled", "decode")

    def __init__(
        self,
        *,
        num_virtual_tokens: int,
        encoder_hidden_size: int | None = None,
        num_frozen_tokens: int = 0,
        init: str = "random",
        text: str | None = None,
    ) -> None:
        if not 0 <= num_frozen_tokens < num_virtual_tokens:
            raise ValueError(f"num_frozen_tokens={num_frozen_tokens} must be less than {num_virtual_tokens=}")
        if encoder_hidden_size is not None and (encoder_hidden_size < 1 or num_frozen_tokens):
            raise ValueError(f"encoder_hidden_size={encoder_hidden_size}: positive, and then no tokens are frozen")
        if init not in ("random", "text"):
            raise ValueError(f"init={init}: the choices are random and text")
        self.num_tokens, self.num_frozen, self.hidden = num_virtual_tokens, num_frozen_tokens, encoder_hidden_size
        self.init, self.text = init, text

    def attach(self, model: Any, *, tokenizer: Any, num_steps: int, train_rows: Sequence[Row]) -> Any:
        """Freeze the base and put the prefix before every row."""
        layers, heads, size = _shape(model)
        states = States((self.num_tokens - self.num_frozen, layers, heads, size), hidden=self.hidden)
        flat = torch.randn(self.num_tokens, layers * 2 * heads * size) if self.num_frozen else None
        if self.init == "text":
            flat = self._of_text(model, tokenizer, train_rows)
        if self.num_frozen and flat is not None:
            states.frozen = flat[: self.num_frozen]
        if self.init == "text" and flat is not None:
            states.set(flat[self.num_frozen :])
        return _insert(model, states, num_tokens=self.num_tokens)

    def prefix_kv(self, model: Any) -> Tensor:
        """(layers, 2, key heads, virtual tokens, size): what the cache of every row begins with."""
        found: Tensor = model.prefix()
        return found

    def save(self, model: Any, folder: Path) -> None:
        """The keys and values themselves, as PEFT saves a prefix: without the projection that made them."""
        states = model.prefix
        config = PrefixTuningConfig(
            task_type="CAUSAL_LM",
            num_virtual_tokens=self.num_tokens,
            num_layers=states.shape[1],
            num_attention_heads=states.shape[2],
            token_dim=states.width,
            num_transformer_submodules=1,
            encoder_hidden_size=self.hidden or states.width,
            base_model_name_or_path=model.name_or_path,
            inference_mode=True,
        )
        config.save_pretrained(str(folder))
        tensors = {KEY: states.flat().detach().cpu().contiguous()}
        save_file(tensors, folder / FILE, metadata={"format": "pt"})

    def load(self, model: Any, folder: Path) -> Any:
        """The saved keys and values before every row of a fresh base."""
        flat, (layers, heads, size) = load_file(folder / FILE)[KEY], _shape(model)
        if flat.shape[1] != layers * 2 * heads * size:
            raise ValueError(f"{folder / FILE} is of another base: its prefix has {flat.shape[1]} numbers a token")
        states = States((len(flat), layers, heads, size), hidden=None)
        states.set(flat)
        return _insert(model, states, num_tokens=len(flat))

    @torch.no_grad()
    def _of_text(self, model: Any, tokenizer: Any, train_rows: Sequence[Row]) -> Tensor:
        """Keys and values (tokens, layers * 2 * width) that the base has for a text, repeated if it is too short."""
        rows = train_rows[: self.num_tokens]  # a row has at least one token
        text = self.text or "\n".join(f"{row.prompt}\n{row.target}" for row in rows)
        ids = tokenizer(text, add_special_tokens=False).input_ids if text else []
        if not ids:
            raise ValueError("init=text needs a text: set method.adapter.text, or train on rows that have one")
        ids = (list(ids) * self.num_tokens)[: self.num_tokens]
        cache = model(input_ids=torch.tensor([ids], device=model.device), use_cache=True).past_key_values
        found = torch.stack([torch.stack([layer.keys[0], layer.values[0]]) for layer in cache.layers])
        return found.float().permute(3, 0, 1, 2, 4).flatten(1).contiguous()  # (tokens, layers, 2, heads, size)


def _shape(model: Any) -> tuple[int, int, int]:
    """Layers, key heads, size of a head."""
    config, first = model.config, attention(blocks(model)[0])
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return config.num_hidden_layers, heads, int(first.head_dim)  # type: ignore[arg-type]


def _insert(model: Any, states: States, *, num_tokens: int) -> Any:
    model.requires_grad_(False)
    model.prefix = states.to(model.device)
    prefixes.insert(model, [attention(block) for block in blocks(model)], states=states, num_tokens=num_tokens)
    return model
