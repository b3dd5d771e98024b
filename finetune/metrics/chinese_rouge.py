"""Chinese ROUGE for `evaluate`: `evaluate.load("finetune/metrics/chinese_rouge.py")`, without a network.

One import a line: `evaluate` reads this file's imports by pattern and takes `import a, b` for a module `a,`.
"""

from typing import Any

import datasets
import evaluate

from finetune.scores.conventions import mean_rouge

DESCRIPTION = "ROUGE-1/2/L F1 in percent: jieba words, sets of n-grams; `-char`: characters; `-multiset`: multisets."
CITATION = """@inproceedings{lin-2004-rouge, title = "{ROUGE}: A Package for Automatic Evaluation of Summaries",
author = "Lin, Chin-Yew", booktitle = "Text Summarization Branches Out", year = "2004"}"""


class ChineseRouge(evaluate.Metric):
    """Means over the pairs; an empty prediction counts as 0."""

    def _info(self) -> evaluate.MetricInfo:
        features = datasets.Features(
            {"predictions": datasets.Value("string"), "references": datasets.Value("string")},
        )
        return evaluate.MetricInfo(description=DESCRIPTION, citation=CITATION, features=features)

    def _compute(self, *, predictions: list[str], references: list[str], **_: Any) -> dict[str, float]:
        return mean_rouge(predictions, references=references)
