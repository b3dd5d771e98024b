"""The summary run of a study, offline, on real folders."""

import json

import pytest

from finetune.report import main, make_studies
from finetune.reporting.summary_run import cell_table


def test_offline_it_is_one_run_with_the_cells_and_charts(make_run, multirun, monkeypatch):
    monkeypatch.chdir(multirun)
    make_run(method="none", rouge=20.0, trainable=0)
    make_run(method="lora", rouge=60.0)
    assert main([str(multirun), "--wandb", "offline"]) == 0
    [folder] = (multirun / "main" / "wandb").glob("offline-run-*")
    assert list(folder.glob("*.wandb"))
    tables = {path.name.split("_")[0]: json.loads(path.read_text()) for path in folder.rglob("*.table.json")}
    lead = tables["cells"]["columns"].index("ROUGE-L")
    assert [row[lead] for row in tables["cells"]["data"]] == [20.0, 60.0]
    assert (multirun / "main" / "report.html").is_file()
    assert main([str(multirun)]) == 0  # the folders of W&B are no runs


def test_a_failure_of_wandb_leaves_the_report(make_run, multirun, capsys):
    make_run()
    (multirun / "main" / "wandb").write_text("a file where W&B wants a folder")
    assert main([str(multirun), "--wandb", "offline"]) == 0
    assert "the report is in the folder all the same" in " ".join(capsys.readouterr().out.split())
    assert (multirun / "main" / "report.html").is_file()


def test_cells_without_scores_are_lines_without_numbers(make_run, multirun):
    make_run(method="lora", seed=1, rouge=60.0)
    make_run(method="lora", seed=2, rouge=62.0)
    make_run(method="full", state="failed")
    [study] = make_studies(multirun, study=None, convention="words")
    header, rows = cell_table(study)
    full, lora = (dict(zip(header, row, strict=True)) for row in rows)
    assert (full["state"], full["ROUGE-L"]) == ("failed", None)
    assert (lora["seeds"], lora["ROUGE-L"]) == ("2", pytest.approx(61.0))
