"""The schema of a run's configuration: which keys there are, their types and ranges, and what may be called by name."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

# What a configuration may name as a `_target_`, by place; a configuration from a stranger can run nothing else.
ADAPTERS = re.compile(r"peft\.\w+Config|finetune\.methods\.[a-z]\w*\.[A-Z]\w*")
READERS = re.compile(r"finetune\.data\.[a-z]\w*\.[a-z]\w*")
OPTIMIZERS = re.compile(r"(torch|bitsandbytes)\.optim\.[A-Z]\w*")
SPECIAL = re.compile(r"_(target|args|partial|recursive|convert)_")  # keys that mean something to Hydra's instantiate

Word = Annotated[str, Field(pattern=r"^\w[\w.-]*$", max_length=80)]  # also a folder's name
Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]
Scale = Literal["tiny", "small", "full"]
Trait = Literal["linear", "bias", "rope", "packing"]  # of a base


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
    has: list[Trait]
    precision: Literal["float32", "bfloat16", "float16"]
    checkpoint_activations: bool | Literal["auto"]
    rope_scaling: Literal["linear"] | None


class Method(Section):
    """conf/method: a way to tune a base."""

    name: Word
    lr: dict[Scale, Annotated[float, Field(ge=0, le=10)]]
    quantize: Literal["nf4", "int8"] | None
    needs: list[Trait | Literal["full_precision", "choices"]]
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
    batch_tokens: Count | Literal["auto"] | None
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
    alike: Annotated[int, Field(ge=1)] | None = None


class Evaluate(Section):
    """How answers are generated."""

    backend: Literal["vllm"] | None = None
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


def _special(node: Any) -> Iterator[str]:
    """The keys at any depth that Hydra's instantiate would act on."""
    if isinstance(node, Mapping):
        yield from (str(key) for key in node if SPECIAL.fullmatch(str(key)))
    for value in node.values() if isinstance(node, Mapping) else node if isinstance(node, list | tuple) else ():
        yield from _special(value)
