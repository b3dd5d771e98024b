"""The model to train: the method put onto the base, and its parameters counted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from accelerate.utils import set_seed

from finetune.budget import recomputes
from finetune.config import learning_rate
from finetune.job import Job
from finetune.methods.method import trainable
from finetune.models.load import Base


def attached(job: Job, steps: Sequence[Sequence[int]]) -> tuple[Any, dict[str, Any]]:
    """The model to train with these steps, and its parameter counts."""
    set_seed(job.config["seed"])
    before = {id(parameter) for parameter in job.base.model.parameters()}
    model = job.method.attach(
        job.base.model, tokenizer=job.base.tokenizer, num_steps=len(steps), train_rows=job.split.train
    )
    if recomputes(job, steps, num_trained=_num_trained(model)):
        job.base.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model = model.to(job.accelerator.device)
    learnt = job.method.fit(model, job.split.train, encode=job.encode, lr=learning_rate(job.config))
    return model, _count(model, job.base, before=before, learnt=learnt)


def _count(model: Any, base: Base, *, before: set[int], learnt: int) -> dict[str, Any]:
    """Parameters; a 4-bit base counts what it stands for, not its packed bytes."""
    trained = learnt + _num_trained(model)
    total = learnt + base.num_parameters + sum(p.numel() for p in model.parameters() if id(p) not in before)
    return {"trainable_parameters": trained, "total_parameters": total, "trainable_percent": 100 * trained / total}


def _num_trained(model: Any) -> int:
    return sum(parameter.numel() for parameter in trainable(model))
