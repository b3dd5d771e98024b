"""What a run found, in the form of its files: lines of predictions.jsonl, and scores.json."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from finetune.data.rows import Row
from finetune.scores import aggregate, score_rows

Line = dict[str, Any]
Reply = tuple[str, str]  # text, finish reason


def lines(rows: Sequence[Row], replies: Sequence[Reply], *, template: int = 0) -> list[Line]:
    """Scored lines of predictions.jsonl; template 0 is the task's own prompt, others are its rewordings."""
    found = [_line(row, reply, template=template) for row, reply in zip(rows, replies, strict=True)]
    for line, scores in zip(found, score_rows(found), strict=True):
        line["scores"] = scores
    return found


def result(
    predictions: Sequence[Line],
    history: Sequence[Mapping[str, Any]],
    *,
    adapter: Path,
    unsupported: Mapping[str, str],
    cost: Mapping[str, Any],
) -> dict[str, Any]:
    """The content of scores.json that predictions and steps give; `unsupported` are tasks, and why."""
    last = history[-1] if history else {"seconds": 0.0, "num_tokens": 0}
    reworded = rewording(predictions)
    return {
        "version": 1,
        "scores": aggregate(predictions),
        **({"rewording": reworded} if reworded else {}),
        **({"unsupported_tasks": dict(unsupported)} if unsupported else {}),
        "cost": {
            **cost,
            "train_seconds": last["seconds"],
            "tokens_per_second": last["num_tokens"] / last["seconds"] if history else 0.0,
            **({"way": last["way"]} if history else {}),
            "adapter_mb": sum(file.stat().st_size for file in adapter.glob("*.safetensors")) / 1e6,
            "micro_batch_halvings": last.get("micro_batch_halvings", 0),
        },
        "num_steps": len(history),
        "skipped_steps": sum("skipped" in line for line in history),
    }


def losses(history: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Training loss over the last twenty steps; validation loss at the end and at its best. Null is no number."""
    last = [line["loss"] for line in history[-20:] if line["loss"] is not None]
    measured = [(line["valid_loss"], line["step"]) for line in history if line.get("valid_loss") is not None]
    found: dict[str, Any] = {"train": fmean(last)} if last else {}
    if measured:
        best, step = min(measured)
        found |= {"valid": measured[-1][0], "best_valid": best, "best_step": step}
    return found


def finite(value: Any) -> Any:
    """The value with null where a number is not finite: JSON has no other word for it."""
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def rewording(predictions: Sequence[Line]) -> dict[str, Any]:
    """ROUGE-1 of the rows that were asked in other words, of the same rows as they stand, and what is lost; percent."""
    own = {(line["task"], line["id"]): line["scores"]["rouge-1"] for line in predictions if not line["template"]}
    others = [line for line in predictions if line["template"]]
    if not others:
        return {}
    as_asked = fmean(own[line["task"], line["id"]] for line in others)
    otherwise = fmean(line["scores"]["rouge-1"] for line in others)
    counts = {"num_rows": len(others)}
    return {"rouge-1": otherwise, "rouge-1 original": as_asked, "rouge-1 drop": as_asked - otherwise} | counts


def _line(row: Row, reply: Reply, *, template: int) -> Line:
    """One line, without its scores."""
    text, reason = reply
    return {
        "id": row.id,
        "task": row.task,
        "kind": row.kind,
        "prompt": row.prompt,
        "template": template,
        "choices": list(row.choices) or None,
        "reference": row.target,
        "prediction": text,
        "finish_reason": reason,
    }
