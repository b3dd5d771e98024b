"""The checks that need the libraries, in one process before a sweep starts: data, optimizer, adapter arguments.

Reads a JSON list of {model, method, task, optim, scale} from standard input; writes {"wrong": [...], "num_gpus": N}.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch

from finetune.data import rows
from finetune.methods.build import build


def main() -> None:
    """Check every distinct part once."""
    found: dict[str, None] = {}
    seen: set[str] = set()
    for part in json.load(sys.stdin):
        for check, what in ((rows.load, part["task"]), (build, part["method"])):
            key = json.dumps([check.__qualname__, what], sort_keys=True)
            if key not in seen:
                seen.add(key)
                found.update(dict.fromkeys(_problems(check, what)))
    json.dump({"wrong": list(found), "num_gpus": torch.cuda.device_count()}, sys.stdout)


def _problems(check: Callable[[Mapping[str, Any]], object], what: Mapping[str, Any]) -> list[str]:
    try:
        check(what)
    except (ValueError, TypeError, OSError) as error:
        return str(error).splitlines()
    return []


if __name__ == "__main__":
    main()
