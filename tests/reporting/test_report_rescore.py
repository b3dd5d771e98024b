import json

import pytest

from finetune.report import main
from finetune.reporting import rescore as module
from finetune.reporting.rescore import rescore
from finetune.scores import aggregate, score_rows
from finetune.scores.provenance import provenance


def row(number, prediction="患者发热", **changed):
    same = {"id": str(number), "task": "NER", "kind": "ner", "prompt": "", "template": 0, "choices": ["疾病"]}
    return (
        same | {"reference": "患者发热三天", "prediction": prediction, "finish_reason": "stop", "scores": {}} | changed
    )


@pytest.fixture
def make_scored_run(make_run):
    """A done run with these predictions, whose scores are all wrong."""

    def make(rows, **names):
        folder = make_run(**names)
        (folder / "predictions.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows), encoding="utf-8")
        return folder

    return make


def test_everything_is_scored_as_at_the_end_of_a_run(make_scored_run, monkeypatch):
    monkeypatch.setattr(module, "ROWS_AT_ONCE", 3)
    rows = [row(number, "发热" * number + " <b>\ud83d", task=f"T{number % 2}") for number in range(10)]
    folder = make_scored_run(rows)
    assert list(rescore([folder], num_processes=2)) == [(folder, "")]
    lines = [json.loads(line) for line in (folder / "predictions.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line.pop("scores") for line in lines] == score_rows(rows)
    assert [line["prediction"] for line in lines] == [each["prediction"] for each in rows]
    record = json.loads((folder / "scores.json").read_text())
    assert record["scores"] == aggregate(rows)
    assert record["scores"]["scorer"] == provenance()
    assert record["cost"]["adapter_mb"] == 4.9  # the rest stays


def test_the_order_of_folders_stays(make_scored_run):
    folders = [make_scored_run([row(1)] * (7 - number), seed=number) for number in range(1, 7)]
    assert [folder for folder, _ in rescore(folders, num_processes=2)] == folders


@pytest.mark.parametrize(
    ("last_line", "problem"),
    [
        ('{"id": "2", "task', "predictions.jsonl:2: JSONDecodeError"),
        ("[]", "predictions.jsonl:2: TypeError"),
        ('{"id": "2"}', "predictions.jsonl:2: KeyError: 'prediction'"),
        ('{"prediction": 3, "reference": "x", "finish_reason": "stop"}', "predictions.jsonl:2: "),
    ],
)
def test_a_broken_line_leaves_the_folder_as_it_was(make_scored_run, last_line, problem):
    folder = make_scored_run([row(1)])
    with (folder / "predictions.jsonl").open("a") as file:
        file.write(last_line)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    [(_, found)] = rescore([folder], num_processes=1)
    assert found.startswith(problem)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_the_command_scores_done_runs_and_names_the_others(make_scored_run, make_run, multirun, capsys):
    make_scored_run([row(1, "患者发热三天")], method="lora")
    make_run(method="prefix")  # done, but its predictions are gone
    make_run(method="full", state="failed")
    assert main([str(multirun), "--rescore"]) == 0
    shown = capsys.readouterr().out
    assert "scored again: 1 of 2 done runs" in shown
    assert "not scored again" in shown
    assert "100.00" in (multirun / "main" / "report.md").read_text(encoding="utf-8")


def test_no_runs():
    assert list(rescore([])) == []
