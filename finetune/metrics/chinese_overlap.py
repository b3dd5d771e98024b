"""BLEU-4 and chrF for `evaluate`: `evaluate.load("finetune/metrics/chinese_overlap.py")`, without a network."""

from typing import Any

import datasets
import evaluate

from finetune.scores.overlap import bleu_and_chrf, count_overlap

DESCRIPTION = "`bleu-4` (sacrebleu's tok:zh) and `chrf` in percent, over all pairs together."


class ChineseOverlap(evaluate.Metric):
    """Of the pairs together, equal to sacrebleu's corpus scores."""

    def _info(self) -> evaluate.MetricInfo:
        texts = {"predictions": datasets.Value("string"), "references": datasets.Value("string")}
        return evaluate.MetricInfo(description=DESCRIPTION, citation="", features=datasets.Features(texts))

    def _compute(self, *, predictions: list[str], references: list[str], **_: Any) -> dict[str, float]:
        return bleu_and_chrf(map(count_overlap, predictions, references))
