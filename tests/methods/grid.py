"""The method files on tiny bases: what several tests of methods need."""

from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from conftest import tiny_base
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from finetune.cells import CONF
from finetune.methods.build import build
from finetune.methods.method import Method
from finetune.models.load import keep_packing

MODELS = {"qwen2": "qwen", "llama": "llama", "glm": "chatglm", "bloom": "bloom"}
UNTRAINED = ("none", "few_shot", "decoder_tuning")  # no loss to lower; each has tests of its own
NAMES = sorted({path.stem for path in (CONF / "method").glob("*.yaml")} - set(UNTRAINED))
FIELD = (  # the methods that researchers of the field compare
    *("full", "freeze", "bitfit", "lora", "qlora", "dora", "adalora", "delta_lora", "prompt", "ptuning", "ptuning_v2"),
    *("prefix", "adapter", "llama_adapter", "llama_pro", "ia3"),
)
# These do not start as the base, by design: virtual tokens, dropped singular values, factors that are small but not 0.
OTHER_START = ("cartridge", "kasa", "prefix", "prompt", "ptuning", "ptuning_v2", "unilora", "vblora")
# The tiny bases have keys of 16 x 32, for which real ranks, blocks and groups are too large.
SMALLER = {
    "boft": {"boft_block_size": 4},
    "c3a": {"block_size": 16},
    "cartridge": {"text": "a text"},
    "fourierft": {"n_frequency": 200},
    "kasa": {"r": 8},
    "psoft": {"r": 8},
    "road": {"group_size": 16},
    "vblora": {"vector_length": 16},
    "waveft": {"n_frequency": 200},
}


@cache
def _section(name: str) -> dict:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return OmegaConf.to_container(compose(f"method/{name}"))


@cache
def config(name: str, architecture: str) -> dict[str, Any]:
    """The `method` and `model` sections of a cell, the method's sizes fit for a tiny base."""
    model = OmegaConf.load(CONF / "model" / f"{MODELS[architecture]}.yaml")
    found = OmegaConf.to_container(OmegaConf.create({**_section(name), "model": model}), resolve=True)
    found["method"]["adapter"] |= SMALLER.get(name, {})
    return found


def make(name: str, architecture: str) -> Method:
    return build(config(name, architecture)["method"])


def tokenizer(text: str, *, add_special_tokens: bool) -> Any:
    """Letters as tokens of the tiny bases."""
    return SimpleNamespace(input_ids=[ord(letter) % 93 + 3 for letter in text])


def attach(method: Method, base: Any, *, num_steps: int = 20) -> Any:
    torch.manual_seed(1)
    return method.attach(base, tokenizer=tokenizer, num_steps=num_steps, train_rows=())


def varied_base(architecture: str) -> Any:
    """A base whose biases and norms differ from 0 and 1, as a trained one's do, and whose blocks say something."""
    base = tiny_base(architecture)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in base.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_((0.1 if parameter.dim() == 1 else 0.08) * noise)
    return base


def stored_base(architecture: str, *, quantize: str | None, folder: Path) -> Any:
    """The same base, quantised as `quantize` says; `folder` keeps it in between."""
    base = varied_base(architecture)
    if not quantize:
        return base
    base.save_pretrained(folder)
    four_bits = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    how = transformers.BitsAndBytesConfig(**four_bits if quantize == "nf4" else {"load_in_8bit": True})
    loading = {"quantization_config": how, "dtype": torch.float32, "device_map": {"": "cpu"}}
    found = transformers.AutoModelForCausalLM.from_pretrained(folder, **loading).eval()
    keep_packing(found)
    return found


@torch.no_grad()
def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Logits (rows, tokens, vocabulary) of `ids`, those of virtual tokens left out."""
    model.eval()
    return model(input_ids=ids, use_cache=False).logits[:, -ids.shape[1] :]
