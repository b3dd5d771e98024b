"""Every method of the PEFT library: one YAML file names its config class, and this does the rest."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, PeftType, get_peft_model
from peft.tuners.lora.monteclora import MontecloraSampler
from torch import Tensor, nn

from finetune.data.rows import Row
from finetune.methods.method import Finding, Method
from finetune.models import virtual_tokens
from finetune.models.lean import lean

PREFIXES = (PeftType.PREFIX_TUNING, PeftType.CARTRIDGE)  # live in the cache, not among the embeddings
EMBEDDED = (PeftType.PROMPT_TUNING, PeftType.P_TUNING)  # virtual tokens that are put before each row here
# LoRA starts that take a part out of the base's weights and put it into A and B, and do not give it back.
MOVING = ("pissa", "olora", "loftq")
RANDOM = (PeftType.UNILORA, PeftType.VBLORA)  # their factors are small at the start, but not 0
COPYING = (PeftType.LN_TUNING, PeftType.SHADOW)  # train copies of the base's modules, in the base's precision


class Peft(Method):
    """A PEFT config, attached."""

    def __init__(self, config: PeftConfig) -> None:
        self.config = config
        self.wrapper: Any = None  # PEFT's own model, where the base is trained without it
        self.samplers: dict[str, Any] = {}  # MonteCLoRA's, which draw noise for many steps at once
        self.padding_free = config.peft_type in EMBEDDED or not config.is_prompt_learning
        start = str(getattr(config, "init_lora_weights", None))
        moves = start.startswith(MOVING) or getattr(config, "kasa_config", None)
        self.leaves_base_intact = not (moves or config.peft_type in COPYING or _trains_more(config))
        kasa = getattr(config, "kasa_config", None)  # cuts the smallest singular values off
        self.starts_as_base = not (config.is_prompt_learning or kasa or config.peft_type in RANDOM)
        self.replayable = _replayable(config)
        # PEFT's prefixes fail under checkpointing: cache and mask sizes differ (seen on every base). MonteCLoRA's
        # second forward pass draws other noise than the first: gradients were off by 0.09 (seen).
        self.checkpointable = config.peft_type not in PREFIXES and not getattr(config, "monteclora_config", None)

    def attach(self, model: Any, *, tokenizer: Any, num_steps: int, train_rows: Sequence[Row]) -> Any:
        """Wrap the base; PEFT keeps the method's weights in float32."""
        wrapper = get_peft_model(model, self.config)
        if getattr(self.config, "monteclora_config", None):
            self.samplers = {n: m.sampler for n, m in wrapper.named_modules() if isinstance(m, MontecloraSampler)}
        return self._unwrapped(wrapper)

    def state(self) -> dict[str, Any]:
        """The noise that is drawn and not yet used: for each kind of it one tensor (draws left, ...)."""
        found = {}
        for name, sampler in self.samplers.items():
            left = sampler.buffer[sampler.index :]
            found[name] = {kind: torch.stack([draw[kind] for draw in left]) for kind in left[0]} if left else {}
        return found

    def restore(self, state: dict[str, Any]) -> None:
        """The noise of the run that is resumed; each forward pass moves it to its device."""
        for name, noise in state.items():
            sampler = self.samplers[name]
            draws = zip(*noise.values(), strict=True)
            left = [dict(zip(noise, draw, strict=True)) for draw in draws]
            sampler.index = sampler.buffer_size - len(left)
            sampler.buffer = sampler.buffer[: sampler.index] + left

    def lean(self, model: nn.Module) -> contextlib.AbstractContextManager[None]:
        """LoRA's layers in fewer operations."""
        shared = getattr(self.config, "layer_replication", None)  # layers around one weight
        return lean(model) if self.config.peft_type is PeftType.LORA and not shared else contextlib.nullcontext()

    def penalty(self, model: nn.Module) -> Tensor | float:
        """The terms of KaSA (eq. 9-12) and MonteCLoRA; PEFT computes them and leaves adding them to the loop."""
        named = [name for name in ("kasa", "monteclora") if getattr(self.config, f"{name}_config", None)]
        return sum((getattr(model.base_model, f"_get_{name}_loss")() for name in named), 0.0)

    @torch.no_grad()
    def check(self, model: Any) -> Finding | None:
        """Is the prefix in the cache?"""
        if self.config.peft_type not in PREFIXES:
            return None
        ids = torch.zeros((1, 3), dtype=torch.long, device=model.device)
        found = model(input_ids=ids, use_cache=True).past_key_values.get_seq_length() - ids.shape[1]
        expected = self.config.num_virtual_tokens  # type: ignore[attr-defined]
        return Finding(found == expected, f"{found} of {expected} prefix positions in the cache of a generation")

    def save(self, model: Any, folder: Path) -> None:
        """As PEFT reads it back."""
        (self.wrapper or model).save_pretrained(folder, save_embedding_layers=False)

    def load(self, model: Any, folder: Path) -> Any:
        """PEFT's own loading, from safetensors."""
        return self._unwrapped(PeftModel.from_pretrained(model, folder))

    def _unwrapped(self, wrapper: Any) -> Any:
        """PEFT's model; with virtual tokens the base, because PEFT ignores a pack's boundaries and a row's padding."""
        _share_config(wrapper.get_base_model())
        if self.config.peft_type not in EMBEDDED:
            return wrapper
        self.wrapper, base = wrapper, wrapper.get_base_model()
        base.prompt_encoder = wrapper.prompt_encoder["default"]
        num_tokens = self.config.num_virtual_tokens  # type: ignore[attr-defined]
        virtual_tokens.insert(base, embeddings=lambda: _embeddings(wrapper), num_tokens=num_tokens)
        return base


def _trains_more(config: PeftConfig) -> bool:
    """Does it also train some of the base's modules or biases, which PEFT leaves in the base's precision?"""
    return bool(getattr(config, "modules_to_save", None)) or getattr(config, "bias", "none") not in ("none", False)


def _share_config(base: Any) -> None:
    """Give copies of the base's blocks, which PEFT made with copies of its configuration, the configuration itself.

    How rows attend is told there, while they are packed.
    """
    for module in base.modules():
        if type(getattr(module, "config", None)) is type(base.config):
            module.config = base.config


def _replayable(config: PeftConfig) -> Collection[str]:
    """LoRA without additions, DoRA's steps, and virtual tokens."""
    names = ("kasa_config", "monteclora_config", "velora_config", "use_bdlora", "alora_invocation_tokens")
    if config.peft_type in EMBEDDED:
        return ("graph", "compiled", "decode")
    if config.peft_type is not PeftType.LORA or any(getattr(config, name, None) for name in names):
        return ()
    return ("graph",) if config.use_dora else ("graph", "compiled", "decode")  # type: ignore[attr-defined]


def _embeddings(wrapper: Any) -> Tensor:
    """Prompt tuning's and P-tuning's (virtual tokens, hidden), computed as they are saved: in float32."""
    device, tokens = wrapper.device, wrapper.prompt_tokens
    tokens["default"] = tokens["default"].to(device)  # PEFT copies them in every pass, which no CUDA graph can
    with torch.autocast(device.type, enabled=False):
        found: Tensor = wrapper.get_prompt(batch_size=1)[0]
    return found
