"""PromptCBLUE's scores of one task for `evaluate`, without a network.

metric = evaluate.load("finetune/metrics/promptcblue.py", "CMeEE-V2", kind="ner")
metric.compute(predictions=..., references=..., choices=[["疾病", "药物"], ...])
"""

from typing import Any

import datasets
import evaluate

from finetune.scores.predictions import aggregate

DESCRIPTION = "Every score that finetune computes of rows of a kind, in percent; `official` is the benchmark's own."


class PromptCBLUE(evaluate.Metric):
    """The configuration's name is the task's; `kind` is its task_type. Finish reasons are unknown here."""

    def __init__(self, *, kind: str, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.kind = kind

    def _info(self) -> evaluate.MetricInfo:
        features = {
            "predictions": datasets.Value("string"),
            "references": datasets.Value("string"),
            "choices": datasets.Sequence(datasets.Value("string")),
        }
        return evaluate.MetricInfo(description=DESCRIPTION, citation="", features=datasets.Features(features))

    def _compute(self, *, predictions: list[str], references: list[str], choices: list[Any], **_: Any) -> Any:
        same = {"task": self.config_name, "kind": self.kind, "finish_reason": "stop"}
        rows = [
            {**same, "prediction": prediction, "reference": reference, "choices": allowed}
            for prediction, reference, allowed in zip(predictions, references, choices, strict=True)
        ]
        return aggregate(rows)["tasks"][self.config_name]
