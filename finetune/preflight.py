"""The checks that need the libraries, before a sweep starts: data, optimizer, adapter arguments, who answers."""

from __future__ import annotations

import difflib
import importlib.util
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from finetune.data import rows
from finetune.methods.build import build


def findings(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What is `wrong` with {model, method, task, optim, evaluate, launch, scale}, `num_gpus`, the tasks' `data` hashes.

    A task is named by its JSON. In a fork of a worker: nothing here may touch a GPU but to count them.
    """
    found: dict[str, None] = {}
    seen: set[str] = set()
    data: dict[str, str] = {}

    def read(task: Mapping[str, Any]) -> None:
        data[json.dumps(task, sort_keys=True)] = rows.load(task).data_hash

    for part in parts:
        answers = {"backend": part["evaluate"].get("backend"), "device": part["launch"]["device"]}
        checks = ((read, part["task"]), (build, part["method"]), (optimizer, part["optim"]), (backend, answers))
        for check, what in checks:
            key = json.dumps([check.__qualname__, what], sort_keys=True)
            if key not in seen:
                seen.add(key)
                found.update(dict.fromkeys(_problems(check, what)))
    return {"wrong": list(found), "num_gpus": torch.cuda.device_count(), "data": data}


def optimizer(optim: Mapping[str, Any]) -> None:
    """Raise ValueError for an optimizer that is none, or that does not take the arguments."""
    target = optim["optimizer"]["_target_"]
    module, _, name = target.rpartition(".")
    found = getattr(importlib.import_module(module), name, None)
    if not (inspect.isclass(found) and issubclass(found, torch.optim.Optimizer)):
        known = [n for n, c in vars(importlib.import_module(module)).items() if inspect.isclass(c)]
        raise ValueError(f"optim.optimizer._target_={target} is no optimizer{_near(name, known)}")
    takes = list(inspect.signature(found).parameters)[1:]
    for key in optim["optimizer"]:
        if key == "lr":
            raise ValueError("optim.optimizer.lr: the learning rate is optim.lr, or the method's own")
        if key not in (*takes, "_target_"):
            raise ValueError(f"optim.optimizer.{key}: {target} takes no such argument{_near(key, takes)}")


def backend(answers: Mapping[str, Any]) -> None:
    """Raise ValueError if `evaluate.backend` is not there, or cannot work on `launch.device`."""
    if answers["backend"] != "vllm":
        return
    package, device, wrong = importlib.util.find_spec("vllm"), answers["device"], []
    if not (package and package.origin):  # a mere folder of that name has no origin
        wrong.append("the package vllm is not installed: pip install vllm, or leave evaluate.backend out")
    if device == "cpu" or not torch.cuda.device_count():
        found = "launch.device=cpu" if device == "cpu" else "this host shows none"
        wrong.append(f"it needs a GPU ({found}); leave evaluate.backend out")
    if wrong:
        raise ValueError("\n".join(f"evaluate.backend=vllm: {text}" for text in wrong))


def _near(word: str, known: list[str]) -> str:
    folded = {name.lower(): name for name in known}
    close = difflib.get_close_matches(word.lower(), folded, n=1)
    return (
        f"; did you mean {folded[close[0]]}?" if close else f"; it takes {', '.join(known)}" if len(known) < 30 else ""
    )


def _problems(check: Callable[[Mapping[str, Any]], object], what: Mapping[str, Any]) -> list[str]:
    try:
        check(what)
    except (ValueError, TypeError, OSError, ImportError) as error:
        return str(error).splitlines()
    return []
