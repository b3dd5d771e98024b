"""The checks that need the libraries, before a sweep starts: data, optimizer, adapter arguments."""

from __future__ import annotations

import difflib
import importlib
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from finetune.data import rows
from finetune.methods.build import build


def findings(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What is `wrong` with {model, method, task, optim, scale}, `num_gpus`, and each task's (as JSON) `data` hash.

    In a fork of a worker: nothing here may touch a GPU but to count them.
    """
    found: dict[str, None] = {}
    seen: set[str] = set()
    data: dict[str, str] = {}

    def read(task: Mapping[str, Any]) -> None:
        data[json.dumps(task, sort_keys=True)] = rows.load(task).data_hash

    for part in parts:
        for check, what in ((read, part["task"]), (build, part["method"]), (optimizer, part["optim"])):
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
