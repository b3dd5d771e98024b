"""What each kind of row is scored by: of a row, and of a task, where `official` is PromptCBLUE's one score of the task.

Kinds without an entry (dialogue, instruction, ...) are free text: the overlap scores say what there is to say.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from statistics import fmean
from typing import Any

from finetune.scores import choices, extraction
from finetune.scores.sections import official_rouge_l, section_scores, sections

Row = Mapping[str, Any]

# PromptCBLUE's one score of these is weighted by support (it calls it micro-F1), of the other choice tasks macro-F1
WEIGHTED = ("CHIP-STS", "KUAKE-IR", "KUAKE-QTR", "KUAKE-QQR")
FIRST_LABELS = {  # what an empty answer counts as
    "CHIP-STS": "是的",
    "KUAKE-IR": "相关",
    "KUAKE-QTR": "完全不匹配或者没有参考价值",
    "KUAKE-QQR": "完全一致",
    "CHIP-CTC": choices.NONE_OF_THESE,
    "KUAKE-QIC": choices.NONE_OF_THESE,
    "IMCS-V2-DAC": choices.NONE_OF_THESE,
}
SYNONYMS = {"CHIP-STS": {"相同": "是的", "不同": "不是"}}
UNKNOWN_VERDICTS = {"IMCS-V2-SR": "无法根据上下文确定病人是否患有该症状"}


def score_row(row: Row) -> dict[str, Any]:
    """The scores of one row that its kind adds; shares are 0 or 100, `counts` are what a task's F1 is made of."""
    score, _ = _KINDS.get(row.get("kind", ""), (_nothing, _nothing))
    return score(row)


def score_task(rows: Sequence[Row]) -> dict[str, float]:
    """The scores of a task's rows that are no means over rows, `official` among them."""
    _, score = _KINDS.get(rows[0].get("kind", "") if rows else "", (_nothing, _nothing))
    return score(rows)


def _nothing(_: Any) -> dict[str, Any]:
    return {}


def _score_choice(row: Row) -> dict[str, Any]:
    answer, known = _answer(row, "prediction"), _choices(row)
    is_outside = bool(known) and answer not in {*known, choices.NONE_OF_THESE}
    is_readable = not is_outside or choices.read_choice(answer, choices=known) is not None
    return {
        "accuracy": 100.0 * (answer == _answer(row, "reference")),
        "outside_choices": 100.0 * is_outside,
        "format_failures": 100.0 * (is_outside and is_readable),
        "unparsable": 100.0 * (not is_readable),
    }


def _score_choices(rows: Sequence[Row]) -> dict[str, float]:
    answers, references = ([_answer(row, side) for row in rows] for side in ("prediction", "reference"))
    labels = [{*(_choices(row) or references), choices.NONE_OF_THESE} for row in rows]
    scores = {
        "f1-micro": choices.f1_micro(answers, references=references, labels=labels),
        "f1-macro": choices.f1_macro(answers, references=references),
        "f1-weighted": choices.f1_weighted(answers, references=references),
    }
    return scores | {"official": scores["f1-weighted" if rows[0]["task"] in WEIGHTED else "f1-macro"]}


def _answer(row: Row, side: str) -> str:
    text, task = row[side].strip(), row.get("task", "")
    return SYNONYMS.get(task, {}).get(text, text) or FIRST_LABELS.get(task, "")


def _choices(row: Row) -> Sequence[str]:
    return row.get("choices") or ()


def _score_facts(row: Row, *, parse: Callable[..., extraction.Facts]) -> dict[str, Any]:
    if parse is extraction.verdicts and row.get("task") in UNKNOWN_VERDICTS:
        parse = partial(parse, unknown=UNKNOWN_VERDICTS[row["task"]])
    ours, theirs = parse(row["prediction"], _choices(row)), parse(row["reference"], _choices(row)).found
    num_right = len(ours.found & theirs)
    forgiven = [parse(text, _choices(row)).found & theirs for text in extraction.forgive(row["prediction"])]
    return {
        "f1": 200.0 * num_right / (len(ours.found) + len(theirs)) if ours.found or theirs else 100.0,
        "outside_choices": 100.0 * ours.foreign,
        "format_failures": 100.0 * (max(map(len, forgiven)) > num_right),
        "unparsable": 100.0 * (not ours.form),
        "counts": {"right": num_right, "predicted": len(ours.found), "expected": len(theirs)},
    }


def _score_all_facts(rows: Sequence[Row], *, score: Callable[[Row], dict[str, Any]]) -> dict[str, float]:
    counts = [(row.get("scores") or {}).get("counts") or score(row)["counts"] for row in rows]
    scores = extraction.precision_recall_f1((each["right"], each["predicted"], each["expected"]) for each in counts)
    return scores | {"official": scores["f1"]}


def _score_response(row: Row) -> dict[str, Any]:
    return {"rouge-l-official": official_rouge_l(row["prediction"].strip(), row["reference"].strip())}


def _score_responses(rows: Sequence[Row]) -> dict[str, float]:
    known = [row.get("scores") or _score_response(row) for row in rows]
    return {"official": fmean(scores["rouge-l-official"] for scores in known)}


def _score_report(row: Row) -> dict[str, Any]:
    by_section = section_scores(row["prediction"], row["reference"])
    num_found = len(sections(row["prediction"]))
    num_forgiven = max(len(sections(text)) for text in extraction.forgive(row["prediction"]))
    return {
        **{f"section-{name}": score for name, score in by_section.items()},
        "rouge-l-sections": fmean(by_section.values()) if by_section else 0.0,
        "format_failures": 100.0 * (num_forgiven > num_found),
        "unparsable": 100.0 * (not num_found),
    }


def _score_reports(rows: Sequence[Row]) -> dict[str, float]:
    scores = [score for row in rows for score in section_scores(row["prediction"], row["reference"]).values()]
    return {"official": fmean(scores) if scores else 0.0}


def _facts(parse: Callable[..., extraction.Facts]) -> tuple[Callable[..., Any], Callable[..., Any]]:
    score = partial(_score_facts, parse=parse)
    return score, partial(_score_all_facts, score=score)


_KINDS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "cls": (_score_choice, _score_choices),
    "matching": (_score_choice, _score_choices),
    "ner": _facts(extraction.entities),
    "spo_generation": _facts(extraction.relations),
    "event_extraction": _facts(extraction.events),
    "normalization": _facts(extraction.terms),
    "attr_cls": _facts(extraction.verdicts),
    "response_generation": (_score_response, _score_responses),
    "report_generation": (_score_report, _score_reports),
}
