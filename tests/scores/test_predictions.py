import json

import pytest

from finetune.scores import aggregate, score_rows
from finetune.scores.conventions import mean_rouge

NAMES = {
    *(f"rouge-{kind}{suffix}" for kind in "12l" for suffix in ("", "-multiset", "-char", "-char-multiset")),
    *("exact", "empty", "never_stopped", "looping", "not_chinese"),
}
OF_A_TASK = {"bleu-4", "chrf", "length", "num_rows"}


def row(prediction, reference="患者发热", *, task="CLINIC-NER", finish_reason="stop"):
    return {"task": task, "prediction": prediction, "reference": reference, "finish_reason": finish_reason}


def test_every_row_has_every_score():
    first, second = score_rows([row("患者发热"), row("", finish_reason="length")])
    assert first.keys() == second.keys() == NAMES | {"overlap"}
    assert first["rouge-l"] == first["exact"] == 100
    assert (second["rouge-1"], second["empty"], second["never_stopped"]) == (0, 100, 100)


def test_a_half_empty_file_scores_half():
    scores = aggregate([row("患者发热"), row("")])["mean"]
    assert (scores["rouge-1"], scores["exact"], scores["empty"]) == (50, 50, 50)


def test_the_mean_is_over_tasks_not_rows():
    rows = [row("患者发热")] + [row("", task="CLINIC-REPORT")] * 3
    scores = aggregate(rows)
    assert scores["mean"]["rouge-1"] == 50
    assert scores["mean"]["num_rows"] == 4
    assert {task: scores["tasks"][task]["num_rows"] for task in scores["tasks"]} == {
        "CLINIC-NER": 1,
        "CLINIC-REPORT": 3,
    }
    assert scores["tasks"]["CLINIC-NER"].keys() == scores["mean"].keys() == NAMES | OF_A_TASK


def test_row_scores_are_used_and_json_keeps_them():
    rows = [row("患者发热"), row("咳嗽", "咳嗽两天")]
    scored = [one | {"scores": scores} for one, scores in zip(rows, score_rows(rows), strict=True)]
    assert aggregate(json.loads(json.dumps(scored))) == aggregate(rows)


def test_no_rows():
    assert aggregate([]) | {"scorer": ...} == {"mean": {"num_rows": 0}, "tasks": {}, "scorer": ...}


def test_mean_rouge_wants_pairs():
    with pytest.raises(ValueError, match="zip"):
        mean_rouge(["是"], references=[])


def test_rewording_is_a_column_and_changes_no_other_score():
    rows = [row("患者发热") | {"id": "a"}, row("患者咳嗽") | {"id": "b"}]
    reworded = [row("患者发热") | {"id": "a", "template": 1}, row("") | {"id": "a", "template": 2}]
    scores = aggregate(rows + reworded)["mean"]
    assert scores.pop("rewording_drop") == pytest.approx((0 + 100) / 2)  # of the row that was asked again
    assert scores == aggregate(rows)["mean"]
