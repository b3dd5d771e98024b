"""A base in memory: its weights in the asked precision or quantised, its tokenizer, and what identifies it."""

import contextlib
import logging
import math
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import filelock
import torch
import transformers

from finetune.models import sources
from finetune.models import tokenizer as tokenizers
from finetune.models.sources import Source

Log = Callable[[str], Any]
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# It says at every product of every layer that int8 products take float16 inputs.
logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)


@dataclass(frozen=True)
class Base:
    """A loaded base; `model` is in evaluation mode and all its parameters still require gradients."""

    model: Any
    tokenizer: Any
    source: str  # where it came from: see finetune.models.sources.Source
    weights_hash: str  # SHA-256 of the stored weights
    num_parameters: int  # also when they are packed into 4 bits; tied weights once
    end_ids: tuple[int, ...]  # token ids that end an answer, the taught one first
    rope_factor: float  # by which positions were shrunk; 1 for none
    folder: Path  # what from_pretrained read


def load(
    model: Mapping[str, Any], *, scale: str, quantize: str | None, device: str, max_tokens: int, log: Log = print
) -> Base:
    """The base of conf/model's keys at this scale, on `device`; rows are at most `max_tokens` long. Raises ValueError.

    `quantize` is None, "nf4" (4 bits, double quantisation) or "int8"; embeddings and head are never quantised.
    """
    if not sys.stderr.isatty():
        transformers.utils.logging.disable_progress_bar()
    source = sources.resolve(model, scale=scale, log=log)
    with _refused_by_name(source):
        return _loaded(source, model, quantize=quantize, device=device, max_tokens=max_tokens, log=log)


def _loaded(
    source: Source, model: Mapping[str, Any], *, quantize: str | None, device: str, max_tokens: int, log: Log
) -> Base:
    weights_hash = sources.weights_hash(source)
    folder = (
        _unpacked(source, precision=model["precision"], key=weights_hash, log=log) if source.gguf else source.folder
    )
    code = bool(model["trust_remote_code"])
    config = _config(folder, model, source=source)
    factor = _stretch(config, rope_scaling=model["rope_scaling"], max_tokens=max_tokens, log=log)
    network = _network(folder, config, options=_options(model["precision"], quantize, device, code), source=source)
    eos_tokens = model["eos_tokens"]
    tokenizer = tokenizers.load(folder, eos_tokens=eos_tokens, template=model["template"], code=code)
    end_ids = tokenizers.end_ids(tokenizer, folder=folder, eos_tokens=eos_tokens)
    _prepare(network, tokenizer, end_ids=end_ids, source=source)
    log(f"loaded {source.name}: {network.num_parameters() / 1e6:.1f} M parameters, {quantize or model['precision']}")
    size, ends = network.num_parameters(), tuple(end_ids)
    return Base(network, tokenizer, source.name, weights_hash, size, ends, factor, folder)


@contextlib.contextmanager
def _refused_by_name(source: Source) -> Iterator[None]:
    """Whatever a damaged file makes the libraries raise (TypeError, a bare Exception: seen) becomes a ValueError."""
    try:
        yield
    except (ValueError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None:  # the disk's own
            raise
        raise ValueError(f"{source.name} cannot be read: {type(error).__name__}: {error}") from error


def _config(folder: Path, model: Mapping[str, Any], *, source: Source) -> Any:
    """The configuration of the stored base, of the class whose layers conf/model names."""
    try:
        config = transformers.AutoConfig.from_pretrained(
            folder, trust_remote_code=bool(model["trust_remote_code"]), local_files_only=True
        )
    except (ValueError, OSError) as error:
        raise ValueError(f"{source.name}: its configuration cannot be read: {error}") from error
    found = config.architectures or [model["architecture"]]
    if model["architecture"] not in found:
        message = (
            f"{source.name} is a {', '.join(found)}, but model={model['name']} describes a {model['architecture']}, "
            "whose layers have other names; choose the model file of that class"
        )
        raise ValueError(message)
    return config


def _stretch(config: Any, *, rope_scaling: str | None, max_tokens: int, log: Log) -> float:
    """Linear scaling of rotary positions (kaiokendev 2023), if rows are longer than the base's positions."""
    num_positions = getattr(config, "max_position_embeddings", None)
    rope: dict[str, Any] = getattr(config, "rope_parameters", None) or {}
    if rope_scaling not in (None, "linear"):
        raise ValueError(f"model.rope_scaling={rope_scaling}: the choices are null and linear")
    if rope_scaling and not (rope and num_positions):
        raise ValueError(f"model.rope_scaling={rope_scaling}: {config.model_type} has no rotary positions")
    if not num_positions or max_tokens <= num_positions:
        return 1.0
    if not rope_scaling:
        log(
            f"rows may have up to {max_tokens} tokens, more than the {num_positions} positions that this base knows "
            "(environment.json counts those that do); model.rope_scaling=linear stretches positions"
        )
        return 1.0
    factor = float(math.ceil(max_tokens / num_positions))
    kept = {key: value for key, value in rope.items() if key in ("rope_theta", "partial_rotary_factor")}
    config.rope_parameters = {**kept, "rope_type": "linear", "factor": factor}
    config.max_position_embeddings = int(num_positions * factor)
    log(f"linear RoPE scaling by {factor:g}: {max_tokens} tokens in {num_positions} positions")
    return factor


def _options(precision: str, quantize: str | None, device: str, code: bool) -> dict[str, Any]:
    """What from_pretrained is told of precision, quantisation and place."""
    if precision not in PRECISIONS:
        raise ValueError(f"model.precision={precision}: the choices are {', '.join(PRECISIONS)}")
    dtype = PRECISIONS[precision]
    options: dict[str, Any] = {"dtype": dtype, "trust_remote_code": code}
    # Without a map the weights are made on the CPU, which sharded training wants.
    if quantize or device != "cpu":
        options["device_map"] = {"": device}
    if quantize == "nf4":
        options["quantization_config"] = transformers.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    elif quantize == "int8":
        options["quantization_config"] = transformers.BitsAndBytesConfig(load_in_8bit=True)
    elif quantize is not None:
        raise ValueError(f"method.quantize={quantize}: the choices are null, nf4 and int8")
    return options


def _network(folder: Path, config: Any, *, options: dict[str, Any], source: Source) -> Any:
    try:
        loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
            folder, config=config, use_safetensors=True, local_files_only=True, output_loading_info=True, **options
        )
    except ImportError as error:
        raise ValueError(f"loading {source.name} needs another package: {error}") from error
    except (OSError, RuntimeError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise ValueError(f"{source.name}: its weights cannot be loaded: {error}") from error
    network, info = loaded
    if missing := sorted(info["missing_keys"]):
        # transformers would fill them with random numbers and only warn.
        raise ValueError(f"{source.name} lacks {len(missing)} weights of its architecture: {', '.join(missing[:4])}")
    return network


def _prepare(network: Any, tokenizer: Any, *, end_ids: list[int], source: Source) -> None:
    num_embeddings = network.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > num_embeddings:
        message = f"{source.name}: its tokenizer has {len(tokenizer)} tokens, its embeddings only {num_embeddings}"
        raise ValueError(message)
    network.config.pad_token_id = tokenizer.pad_token_id
    network.name_or_path = source.name  # an adapter's file names its base, not a folder of this machine
    # What comes with the weights may sample and punish repetition (Qwen2.5: 1.1), also when asked for greedy decoding.
    network.generation_config = transformers.GenerationConfig(
        eos_token_id=end_ids, pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id
    )
    keep_packing(network)
    network.eval()


def keep_packing(network: Any) -> None:
    """Keep 4-bit weights as they lie.

    On CPUs with bfloat16 units bitsandbytes would repack them at the first evaluation, for a product in bfloat16
    through which no gradient flows.
    """
    for module in network.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def _unpacked(source: Source, *, precision: str, key: str, log: Log) -> Path:
    """A folder of safetensors made from a GGUF file once: loading it takes 1 s where GGUF takes 10 s or more.

    transformers keeps GGUF weights packed and untrainable, and refuses to quantise them in another way.
    """
    folder = sources.cache_folder() / "gguf" / f"{key[:16]}-{precision}"
    if folder.exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(f"{folder}.lock"):
        if not folder.exists():
            log(f"unpacking {source.name} into {folder}")
            draft = folder.with_name(f"{folder.name}.draft")
            shutil.rmtree(draft, ignore_errors=True)  # of one that was killed
            try:
                _unpack(source, draft, dtype=PRECISIONS[precision])
                draft.rename(folder)
            finally:
                shutil.rmtree(draft, ignore_errors=True)
    return folder


def _unpack(source: Source, folder: Path, *, dtype: torch.dtype) -> None:
    place = {"gguf_file": source.gguf, "local_files_only": True}
    try:
        network = transformers.AutoModelForCausalLM.from_pretrained(
            source.folder, dtype=dtype, quantization_config=transformers.GgufConfig(dequantize=True), **place
        )
        tokenizer = transformers.AutoTokenizer.from_pretrained(source.folder, **place)
    except (ValueError, KeyError, IndexError, RuntimeError) as error:
        raise ValueError(f"{source.name} cannot be read as a GGUF model: {error!r}") from error
    network.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
