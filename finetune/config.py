"""The configuration of one run: its schema, its checks, and what its identity is.

`problems` lists everything that is wrong with a composed configuration; it needs neither torch nor a file of weights.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

# What a configuration may name as a `_target_`, by place; a configuration from a stranger can run nothing else.
ADAPTERS = re.compile(r"peft\.\w+Config|finetune\.methods\.[a-z]\w*\.[A-Z]\w*")
READERS = re.compile(r"finetune\.data\.[a-z]\w*\.[a-z]\w*")
OPTIMIZERS = re.compile(r"(torch|bitsandbytes)\.optim\.[A-Z]\w*")
SPECIAL = re.compile(r"_(target|args|partial|recursive|convert)_")  # keys that mean something to Hydra's instantiate
DATA_FILES = ("path", "valid_path")  # keys of task.source
NOT_SCIENCE = ("launch", "wandb", "study", "data_dir")  # may differ between two commands that mean the same run

Word = Annotated[str, Field(pattern=r"^\w[\w.-]*$", max_length=80)]  # also a folder's name
Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]
Scale = Literal["tiny", "small", "full"]


def _named(allowed: re.Pattern[str], words: str) -> AfterValidator:
    """The name of a class or function that may stand at one place."""

    def check(name: str) -> str:
        if not allowed.fullmatch(name):
            raise ValueError(f"is not allowed here; allowed are {words}")
        return name

    return AfterValidator(check)


Adapter = Annotated[str, _named(ADAPTERS, "peft.*Config and the classes of finetune.methods")]
Reader = Annotated[str, _named(READERS, "the readers of finetune.data")]
Optimizer = Annotated[str, _named(OPTIMIZERS, "torch.optim.* and bitsandbytes.optim.*")]


class Section(BaseModel):
    """A part of the configuration that knows its keys and refuses others."""

    model_config = ConfigDict(extra="forbid", strict=True, populate_by_name=True)


class Open(BaseModel):
    """Arguments of a `_target_`: their names and types are the target's own matter."""

    model_config = ConfigDict(extra="allow", populate_by_name=True)
    target: str = Field(alias="_target_")

    @model_validator(mode="after")
    def _plain(self) -> Open:
        """Nothing in the arguments can be taken for something to call."""
        for key in _special(self.model_extra or {}):
            raise ValueError(f"{key} is not allowed here: arguments are plain values")
        return self


class AdapterArguments(Open):
    """conf/method: `adapter`."""

    target: Adapter = Field(alias="_target_")


class ReaderArguments(Open):
    """conf/task: `source`."""

    target: Reader = Field(alias="_target_")


class OptimizerArguments(Open):
    """conf/optim: `optimizer`."""

    target: Optimizer = Field(alias="_target_")


class Package(Section):
    """Weights that an installed Python package holds."""

    package: Word


class Weights(Section):
    """Where the weights of one scale are: a hub id and its revision for each hub."""

    huggingface: str
    modelscope: str
    huggingface_revision: str = "main"
    modelscope_revision: str = "master"


class Model(Section):
    """conf/model: a base."""

    name: Word
    architecture: str
    miniature: str | None
    weights: dict[Scale, Literal["miniature"] | Package | Weights]
    path: str | None
    hub: Literal["huggingface", "modelscope"]
    trust_remote_code: bool
    template: Literal["plain"] | None
    attention: list[str]
    qkv: list[str]
    linear: list[str]
    embedding: str
    eos_tokens: list[str]
    has: list[str]
    precision: Literal["float32", "bfloat16", "float16"]
    checkpoint_activations: bool
    rope_scaling: Literal["linear"] | None


class Method(Section):
    """conf/method: a way to tune a base."""

    name: Word
    lr: dict[Scale, Annotated[float, Field(ge=0, le=10)]]
    quantize: Literal["nf4", "int8"] | None
    needs: list[str]
    adapter: AdapterArguments


class Fields(Section):
    """How an item of a file becomes a row; see docs/tasks.md."""

    id: str | None = None
    task: str
    kind: str
    prompt: str
    target: str
    choices: str | None = None
    history: str | None = None


class Task(Section):
    """conf/task: data, prompt and scoring."""

    name: Word
    version: Count
    source: ReaderArguments
    fields: Fields | None
    rewordings: list[str]
    only: list[str] | None
    train_rows: Count | None
    valid_rows: Count | None
    valid_fraction: Annotated[float, Field(gt=0, lt=1)] | None
    skip_empty: bool
    on_bad_row: Literal["refuse", "skip"]
    max_bad_share: Share
    drop_leaks: bool
    max_prompt_tokens: Annotated[int, Field(ge=8)]
    max_target_tokens: Annotated[int, Field(ge=2)]


class Optim(Section):
    """conf/optim: the optimizer, its schedule and its batches."""

    name: Word
    optimizer: OptimizerArguments
    lr: Annotated[float, Field(gt=0, le=10)] | None
    schedule: Literal["cosine", "linear", "constant"]
    warmup: Share
    epochs: Annotated[float, Field(gt=0)]
    max_steps: Count | None
    batch_rows: Count
    accumulation: Count
    max_grad_norm: Annotated[float, Field(gt=0)] | None
    loss_on: Literal["target", "all"]
    neftune_alpha: Annotated[float, Field(gt=0)] | None
    validations: Annotated[int, Field(ge=0)]


class Launch(Section):
    """conf/launch: where and in how many processes a run happens."""

    name: Word
    worker: Literal["never", "always", "auto"]
    num_processes: Annotated[int, Field(ge=1, le=1024)]
    jobs: Annotated[int, Field(ge=1, le=1024)] | None
    device: Literal["auto", "cpu", "cuda"]
    checkpoint_minutes: Annotated[float, Field(ge=0)]
    step: Literal["auto", "eager", "graph", "compiled"]


class Evaluate(Section):
    """How answers are generated."""

    batch_rows: Count
    padding_side: Literal["left", "right"]
    max_new_tokens: Count | None
    forgetting_text: str | None
    rewording_rows: Annotated[int, Field(ge=0)]


class Wandb(Section):
    """The copy of the run in Weights & Biases."""

    mode: Literal["online", "offline", "disabled"]
    project: Word


class Config(Section):
    """One run: one cell of the grid under one seed."""

    study: Word
    seed: Annotated[int, Field(ge=0, lt=2**32)]
    data_dir: str
    deterministic: bool
    scale: Scale
    model: Model
    method: Method
    task: Task
    optim: Optim
    evaluate: Evaluate
    launch: Launch
    wandb: Wandb


def problems(config: Mapping[str, Any]) -> list[str]:
    """Everything that makes `config` invalid, one line each; empty when it can run."""
    found = [f"{key}=???: a value is required" for key in _missing(config)]
    try:
        checked = Config.model_validate(config)
    except ValidationError as error:
        required = [line.partition("=")[0] for line in found]
        lines = (_line(detail, config) for detail in error.errors())
        return found + [line for line in lines if not line.startswith(tuple(f"{key}=" for key in required))]
    return found + list(_across(checked))


def unsupported(config: Mapping[str, Any]) -> str | None:
    """The reason why this method cannot work with this base, or None."""
    method, model, quantize = config["method"], config["model"], config["method"]["quantize"]
    if "choices" in method["needs"] and not ((config["task"]["fields"] or {}).get("choices")):
        return f"{method['name']} needs a list of choices, which no row of {config['task']['name']} has"
    has = [*model["has"], "choices", *([] if quantize else ["full_precision"])]
    lacking = [need for need in method["needs"] if need not in has]
    if lacking:
        base = f"{model['name']} in {quantize}" if quantize else model["name"]
        return f"{method['name']} needs {', '.join(lacking)}, which {base} does not have"
    return None


def learning_rate(config: Mapping[str, Any]) -> float:
    """`optim.lr`, or the method's own for the scale."""
    lr = config["optim"]["lr"]
    return float(config["method"]["lr"][config["scale"]] if lr is None else lr)


def refuse(config: Mapping[str, Any]) -> None:
    """Raise ValueError for a configuration that cannot run, or that nobody may run: a folder can be anyone's."""
    try:
        found = problems(config)
    except RecursionError:  # YAML can hold itself
        found = ["nested too deeply"]
    if found:
        raise ValueError("config.yaml: " + "; ".join(found))


def identity(config: Mapping[str, Any]) -> str:
    """Hash of what makes two runs the same run: the configuration less launch, wandb, study and where the data lie.

    Of a data file its name counts; its content is compared where the data are read.
    """
    return hashlib.sha256(json.dumps(_science(config), sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def differences(old: Mapping[str, Any], new: Mapping[str, Any], *, moved: bool = True) -> list[str]:
    """`key: old -> new` for every key of the identity that differs; `moved` data files are the same."""
    before, after = (dict(_leaves(_science(config, moved=moved))) for config in (old, new))
    keys = sorted(before.keys() | after.keys())
    return [f"{k}: {before.get(k)} -> {after.get(k)}" for k in keys if before.get(k) != after.get(k)]


def _science(config: Mapping[str, Any], *, moved: bool = True) -> dict[str, Any]:
    kept = {key: value for key, value in config.items() if key not in NOT_SCIENCE}
    task = kept.get("task")
    if not moved or not isinstance(task, Mapping) or not isinstance(task.get("source"), Mapping):
        return kept
    files = {key: Path(value).name for key, value in task["source"].items() if key in DATA_FILES and value}
    return {**kept, "task": {**task, "source": {**task["source"], **files}}}


def _across(config: Config) -> Iterator[str]:
    """Checks between keys."""
    optim, ranks = config.optim, config.launch.num_processes
    share = ranks * optim.accumulation
    if optim.batch_rows % share:
        fit = -(-optim.batch_rows // share) * share
        yield (
            f"optim.batch_rows={optim.batch_rows}: must be a multiple of {ranks} processes x "
            f"{optim.accumulation} micro-batches; try optim.batch_rows={fit}"
        )
    if config.scale not in config.model.weights and config.model.path is None:
        yield f"model.weights: {config.model.name} names no weights for scale={config.scale}; set model.path"
    text = config.evaluate.forgetting_text
    if text not in (None, "generated") and not Path(text).is_file():
        yield f"evaluate.forgetting_text={text}: there is no such file; null leaves the measurement out"
    if config.method.quantize and config.method.adapter.target == "finetune.methods.full.Full":
        yield f"method.quantize={config.method.quantize}: quantized weights cannot be trained; use method.quantize=null"


def _line(detail: Any, config: Mapping[str, Any]) -> str:
    """One of pydantic's findings in the words of the command line."""
    place = [str(part) for part in detail["loc"]]
    value = json.dumps(detail["input"], ensure_ascii=False, default=str)[:80]
    if detail["type"] == "extra_forbidden":
        known = _names(place[:-1])
        near = difflib.get_close_matches(place[-1], known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(known) or 'none'}"
        return f"{'.'.join(place)}: no such key; {hint}"
    if detail["type"] == "missing":
        return f"{'.'.join(place)}: missing"
    keys = [part for part in place if part.isidentifier() or part.isdigit()]
    message = detail["msg"].removeprefix("Value error, ").replace("Input s", "s")
    return f"{'.'.join(keys)}={value}: {message}"


def _names(place: list[str]) -> list[str]:
    """The keys that the schema knows at a place."""
    section: Any = Config
    for part in place:
        if part not in getattr(section, "model_fields", {}):
            return []  # below a section of any keys
        section = section.model_fields[part].annotation
        section = next((a for a in getattr(section, "__args__", ()) if isinstance(a, type)), section)
    return sorted(getattr(section, "model_fields", {}))


def _special(node: Any) -> Iterator[str]:
    """The keys at any depth that Hydra's instantiate would act on."""
    if isinstance(node, Mapping):
        yield from (str(key) for key in node if SPECIAL.fullmatch(str(key)))
    for value in node.values() if isinstance(node, Mapping) else node if isinstance(node, list | tuple) else ():
        yield from _special(value)


def _missing(config: Mapping[str, Any]) -> list[str]:
    return [key for key, value in _leaves(config) if value == "???"]


def _leaves(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of every leaf; an empty mapping or list is a leaf."""
    items = node.items() if isinstance(node, Mapping) else enumerate(node) if isinstance(node, list) else ()
    empty = True
    for key, value in items:
        empty = False
        yield from _leaves(value, f"{prefix}.{key}" if prefix else str(key))
    if empty:
        yield prefix, node
