"""Which runs vLLM can answer (`evaluate.backend=vllm`), told before anything starts; no torch here.

Read in the source of vLLM 0.33.0: lora/peft_helper.py, config/lora.py, lora/ops/triton_ops, model_executor/models.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from finetune.schema import Config

UNTRAINED = ("finetune.methods.none.Untouched", "finetune.methods.few_shot.FewShot")
# adapter._target_ -> the rank of what is saved, in r
LORA = {"peft.LoraConfig": 1, "finetune.methods.lora_plus.LoraPlus": 1, "finetune.methods.delta_lora.DeltaLora": 2}
# Arguments with which LoRA is still x W + s x A B on the base as it lies on the disk; any other is refused.
PLAIN = (
    *("task_type", "r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "layers_to_transform"),
    *("layers_pattern", "rank_pattern", "alpha_pattern", "use_rslora"),
    *("lr_ratio", "update_ratio", "warmup"),
)
STARTS = (None, True, False, "gaussian", "orthogonal", "mica")  # init_lora_weights that leave the base's alone
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # that max_lora_rank may be
WITHOUT_LORA = ("BloomForCausalLM",)  # does not derive from SupportsLoRA


def unable(config: Config) -> Iterator[str]:
    """Why vLLM cannot answer this run, with the way out; nothing where it is not asked to."""
    if config.evaluate.backend == "vllm":
        for why, instead in _reasons(config):
            out = f"{instead}, or leave evaluate.backend out" if instead else "leave evaluate.backend out"
            yield f"evaluate.backend=vllm: {why}; {out}"


def rank_limit(rank: int) -> int | None:
    """The smallest `max_lora_rank` that has room for a rank; None if none has."""
    return next((limit for limit in RANKS if limit >= rank), None)


def _reasons(config: Config) -> Iterator[tuple[str, str]]:
    method, target = config.method, config.method.adapter.target
    if config.launch.num_processes > 1:
        yield "vLLM answers for one process", "use launch.num_processes=1"
    if config.deterministic:
        yield "vLLM does not give the same bits each time", "use deterministic=false"
    if config.model.rope_scaling:
        yield "vLLM reads the base as it is stored, with its own positions", "use model.rope_scaling=null"
    if method.quantize:
        yield f"method={method.name} has its base in {method.quantize}, and vLLM would read full weights", ""
    if target in LORA:
        yield from _lora(config, method.adapter.model_extra or {})
    elif target not in UNTRAINED:
        yield f"vLLM can load LoRA and untrained bases, and method={method.name} is neither", ""


def _lora(config: Config, arguments: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    name, model = config.method.name, config.model
    if odd := [f"{key}={value}" for key, value in arguments.items() if not _plain(key, value)]:
        yield f"vLLM cannot load a LoRA with {', '.join(odd)} (method={name})", ""
    rank = LORA[config.method.adapter.target] * _rank(arguments)
    if not rank_limit(rank):
        yield f"method={name} saves a LoRA of rank {rank}, and vLLM takes {RANKS[-1]} at the most", ""
    if model.architecture in WITHOUT_LORA:
        yield f"vLLM has no LoRA for model={model.name} ({model.architecture})", ""
    if model.precision == "float32":
        yield "vLLM computes LoRA in half precision only", "use model.precision=bfloat16 (or float16)"


def _plain(key: str, value: Any) -> bool:
    """Is LoRA with this argument what vLLM takes it for?"""
    if key == "init_lora_weights":
        return value in STARTS
    return key in PLAIN or not value or (key == "bias" and value == "none")


def _rank(arguments: Mapping[str, Any]) -> int:
    """The largest rank that is asked for; what is no number is refused elsewhere."""
    pattern = arguments.get("rank_pattern")
    ranks = [arguments.get("r", 8), *(pattern.values() if isinstance(pattern, Mapping) else ())]
    return max((rank for rank in ranks if isinstance(rank, int)), default=8)
