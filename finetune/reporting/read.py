"""Run folders -> `Run` values. A folder that cannot be read is named with its reason and left out, never an error."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from finetune import runs

Numbers = Mapping[str, float]


@dataclass(frozen=True)
class Run:
    """One run as its folder tells it. `reason` says why it is not done; the numbers of a done run are all finite."""

    folder: Path
    study: str
    task: str
    model: str
    method: str
    seed: str
    state: str  # done | running | failed | unsupported | unfinished
    reason: str = ""
    weights: str | None = None  # hash of the base's weights
    data: str | None = None  # hash of rows and templates
    scores: Mapping[str, Numbers] = field(default_factory=dict)  # by row task, and "mean"
    cost: Numbers = field(default_factory=dict)
    loss: Numbers = field(default_factory=dict)  # nats; `rise`: from the best validation to the end
    forgetting: Numbers = field(default_factory=dict)  # nats on general text: base, tuned, and their difference `rise`
    rewording: Numbers = field(default_factory=dict)
    notes: Numbers = field(default_factory=dict)  # what was counted of the data
    failed_checks: Mapping[str, str] = field(default_factory=dict)  # name -> what it found
    scorer: str | None = None  # equal where scores mean the same


@dataclass(frozen=True)
class LeftOut:
    """A folder that looks like a run but cannot be read."""

    folder: Path
    reason: str


def read_all(root: Path) -> tuple[list[Run], list[LeftOut]]:
    """Read every run below the root, in order of their paths."""
    found, left_out = [], []
    for folder in find(root):
        try:
            found.append(read(folder))
        except Exception as error:  # whatever is wrong with one folder, the others have a report
            kind = "" if isinstance(error, (OSError, ValueError)) else f"{type(error).__name__}: "
            left_out.append(LeftOut(folder, f"{kind}{error}"))
    return found, left_out


def find(root: Path) -> list[Path]:
    """Run folders at or below the root, also of a part of a study and of runs made by hand; links are not followed.

    W&B keeps a config.yaml of its own in the folders called wandb.
    """
    found = []
    for folder, below, files in os.walk(root):
        below[:] = [name for name in below if name != "wandb"]
        if "config.yaml" in files:
            found.append(Path(folder))
            below.clear()
    return sorted(found)


def read(folder: Path) -> Run:
    """Read one run. Raises ValueError or OSError, naming the file, when the folder does not hold what it claims."""
    config = _yaml(folder / "config.yaml")
    state = runs.state(folder)
    about = runs.read_environment(folder)
    weights, data = _hashes(about["hashes"])
    outcome = _outcome(folder) if state == "done" else {"reason": _reason(folder, state)}
    study = config.get("study")
    return Run(
        folder=folder,
        study=study if isinstance(study, str) else folder.absolute().parents[3].name,
        task=_label(config, "task", part=folder.absolute().parents[2].name),
        model=_label(config, "model", part=folder.absolute().parents[1].name),
        method=_label(config, "method", part=folder.absolute().parent.name),
        seed=str(config.get("seed", folder.name)),
        state=state,
        weights=weights,
        data=data,
        notes=_numbers(about.get("notes")),
        **outcome,
    )


def _label(config: Mapping[str, Any], group: str, *, part: str) -> str:
    """The folder's name where it is the group's name with or without a suffix, else (made by hand) the name."""
    choice = config.get(group)
    name = choice.get("name") if isinstance(choice, Mapping) else None
    if not isinstance(name, str) or not name:
        raise ValueError(f"config.yaml: {group}.name is missing")
    return part if part == name or part.startswith(f"{name}+") else name


def _outcome(folder: Path) -> dict[str, Any]:
    record = _json(folder / "scores.json")
    scores = record.get("scores")
    if not isinstance(scores, Mapping) or not isinstance(scores.get("mean"), Mapping):
        raise ValueError("scores.json: scores.mean is missing")
    tasks = scores.get("tasks")
    by_task = {str(task): _numbers(row) for task, row in tasks.items()} if isinstance(tasks, Mapping) else {}
    return {
        "scores": by_task | {"mean": _numbers(scores["mean"])},
        "cost": _numbers(record.get("cost")),
        "loss": _with_rise(_numbers(record.get("loss")), "best_valid", "valid"),
        "forgetting": _with_rise(_numbers(record.get("forgetting")), "base", "tuned"),
        "rewording": _numbers(record.get("rewording")),
        "failed_checks": _failed_checks(record.get("checks")),
        "scorer": _digest(scores.get("scorer")),
    }


def _with_rise(numbers: dict[str, float], before: str, after: str) -> dict[str, float]:
    return numbers | ({"rise": numbers[after] - numbers[before]} if {before, after} <= numbers.keys() else {})


def _failed_checks(checks: Any) -> dict[str, str]:
    items = checks.items() if isinstance(checks, Mapping) else ()
    found = {str(name): check for name, check in items if isinstance(check, Mapping) and check.get("ok") is False}
    return {name: str(check.get("note") or "") for name, check in found.items()}


def _reason(folder: Path, state: str) -> str:
    """Why a run has no scores, in one line."""
    if state == "unfinished":
        return "stopped before the end; the same command goes on with it"
    keys = {"failed": ("kind", "message"), "unsupported": ("reason",), "running": ("host", "pid")}[state]
    name = {"failed": "failure.json", "unsupported": "unsupported.json", "running": "owner.json"}[state]
    try:
        record = _json(folder / name)
    except (OSError, ValueError, RecursionError) as error:
        return str(error)
    return ": ".join(str(record[key]) for key in keys if record.get(key))


def _hashes(hashes: Mapping[str, Any]) -> tuple[str | None, str | None]:
    """What identifies the weights, and data with the prompts' forms."""
    data = [hashes[key] for key in ("data", "templates") if hashes.get(key)]
    return _digest(hashes.get("weights")), _digest(data)


def _digest(value: Any) -> str | None:
    """A text that is equal when the recorded hashes are equal, whatever their shape; None when there are none."""
    if not value or isinstance(value, str):
        return value or None
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _numbers(values: Any) -> dict[str, float]:
    """The finite numbers of a mapping; what was not measured (null) or is no number is not there."""
    items = values.items() if isinstance(values, Mapping) else ()
    return {str(key): value for key, value in items if type(value) in (int, float) and math.isfinite(value)}


def _json(path: Path) -> Mapping[str, Any]:
    return _mapping(path, json.loads, path.read_bytes())


def _yaml(path: Path) -> Mapping[str, Any]:
    """Parse with libyaml where it is there: a hundred configurations take 0.2 s instead of 2 s."""
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    return _mapping(path, lambda text: yaml.load(text, Loader=loader), path.read_bytes())


def _mapping(path: Path, parse: Any, text: bytes) -> Mapping[str, Any]:
    try:
        value = parse(text)
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{path.name}: {error}") from error
    if not isinstance(value, Mapping):
        raise ValueError(f"{path.name}: holds no mapping of names to values")
    return value
