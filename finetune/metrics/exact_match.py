"""Exact match and output health for `evaluate`: `evaluate.load("finetune/metrics/exact_match.py")`, no network."""

from statistics import fmean
from typing import Any

import datasets
import evaluate

from finetune.scores import health

DESCRIPTION = "Shares in percent: `exact`, `empty`, `looping`; `length`: characters for every hundred expected."


class ExactMatch(evaluate.Metric):
    """White space around a text does not count."""

    def _info(self) -> evaluate.MetricInfo:
        texts = {"predictions": datasets.Value("string"), "references": datasets.Value("string")}
        return evaluate.MetricInfo(description=DESCRIPTION, citation="", features=datasets.Features(texts))

    def _compute(self, *, predictions: list[str], references: list[str], **_: Any) -> dict[str, float]:
        return {
            "exact": fmean(map(health.exact, predictions, references)),
            "empty": fmean(map(health.empty, predictions)),
            "looping": fmean(map(health.looping, predictions)),
            "length": health.length(predictions, references=references),
        }
