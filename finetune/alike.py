"""How many cells of a command are compiled to the same code: see finetune.graphs."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from finetune.cells import Cell


def counted(todo: Sequence[Cell]) -> list[Cell]:
    """The cells with `launch.alike`, where the person gave none."""
    numbers = Counter(map(_layers, todo))

    def one(cell: Cell) -> Cell:
        launch = cell.config["launch"]
        alike = launch.get("alike") or numbers[_layers(cell)]
        return replace(cell, config={**cell.config, "launch": {**launch, "alike": alike}})

    return [one(cell) for cell in todo]


def _layers(cell: Cell) -> str:
    """What they have in common; learning rates, tasks and seeds are other numbers in the same code."""
    config = cell.config
    method = {key: value for key, value in config["method"].items() if key != "lr"}
    parts = [config["model"], config["scale"], method, config["deterministic"], config["optim"]["neftune_alpha"]]
    return json.dumps(parts, sort_keys=True)
