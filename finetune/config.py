"""The configuration of one run: what is wrong with it, what it cannot do, and what its identity is.

`problems` lists everything that is wrong with a composed configuration; it needs neither torch nor a file of weights.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from finetune import runs
from finetune.backend import unable
from finetune.schema import Config

# May differ between two commands that mean the same run; recomputed activations are the same.
NOT_SCIENCE = ("launch", "wandb", "study", "data_dir", "model.checkpoint_activations")


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


def differences(old: Mapping[str, Any], new: Mapping[str, Any], *, moved: bool = True) -> list[str]:
    """`key: old -> new` for every key that makes two runs two: launch, wandb, study and where the data lie do not.

    A key that is null is as one that is not there, which an earlier version did not know. Of a data file its name
    counts (its content is compared where the data are read), unless it may not be `moved`.
    """
    before, after = (_science(config, moved=moved) for config in (old, new))
    keys = sorted(before.keys() | after.keys())
    return [f"{k}: {before.get(k)} -> {after.get(k)}" for k in keys if before.get(k) != after.get(k)]


def _science(config: Mapping[str, Any], *, moved: bool) -> dict[str, Any]:
    """By dotted key."""
    others = tuple(f"{key}." for key in NOT_SCIENCE)
    kept = {key: value for key, value in _leaves(config) if not f"{key}.".startswith(others)}
    return kept | {key: Path(kept[key]).name for key in runs.DATA_FILES if moved and kept.get(key)}


def _across(config: Config) -> Iterator[str]:
    """Checks between keys."""
    optim, ranks = config.optim, config.launch.num_processes
    share = ranks * optim.accumulation
    if optim.batch_tokens is None and optim.batch_rows % share:
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
    yield from unable(config)


def _line(detail: Any, config: Mapping[str, Any]) -> str:
    """One of pydantic's findings in the words of the command line."""
    place = [str(part) for part in detail["loc"]]
    value = json.dumps(detail["input"], ensure_ascii=False, default=str)[:80]
    if detail["type"] == "extra_forbidden":
        known = _names(place[:-1])
        hint = near(place[-1], known) or f"; known are {', '.join(known) or 'none'}"
        return f"{'.'.join(place)}: no such key{hint}"
    if detail["type"] == "missing":
        return f"{'.'.join(place)}: missing"
    keys = [part for part in place if part.isidentifier() or part.isdigit()]
    message = detail["msg"].removeprefix("Value error, ").replace("Input s", "s")
    return f"{'.'.join(keys)}={value}: {message}"


def near(word: str, known: Sequence[str]) -> str:
    """`; did you mean lora?`, or nothing when no known word is close."""
    found = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {found[0]}?" if found else ""


def _names(place: list[str]) -> list[str]:
    """The keys that the schema knows at a place."""
    section: Any = Config
    for part in place:
        if part not in getattr(section, "model_fields", {}):
            return []  # below a section of any keys
        section = section.model_fields[part].annotation
        section = next((a for a in getattr(section, "__args__", ()) if isinstance(a, type)), section)
    return sorted(getattr(section, "model_fields", {}))


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
