import json

import pytest

from finetune.reporting import columns as shown_columns
from finetune.reporting.cells import to_cells
from finetune.reporting.read import read_all
from finetune.reporting.tables import checks_tables, data_tables, make_table, reasons_tables, study_tables


@pytest.fixture
def table(multirun):
    """Rows of text by (model, method): the mean over the kinds of rows, ROUGE and costs."""

    def make():
        columns = shown_columns.rouge("words") + shown_columns.COST
        shown = make_table("", "", to_cells(read_all(multirun)[0]), part="mean", columns=columns)
        rows = {(row[0].text, row[1].text): dict(zip(shown.header, row, strict=True)) for row in shown.rows}
        return rows

    return make


def test_mean_and_spread_over_seeds(make_run, table):
    for seed, rouge in ((1, 60.0), (2, 62.0), (3, 64.0)):
        make_run(seed=seed, rouge=rouge)
    row = table()["qwen", "lora"]
    assert (row["ROUGE-1"].text, row["seeds"].text) == ("62.00 ± 2.00", "3")
    assert row["ROUGE-1"].folder.name == "lora"  # the folder of the seeds
    assert row["trainable"].text == "1.23 M"
    assert row["peak GiB"].text == "–"


def test_one_seed_links_to_its_folder_and_has_no_spread(make_run, table):
    folder = make_run(rouge=60.0)
    entry = table()["qwen", "lora"]["ROUGE-1"]
    assert (entry.text, entry.folder) == ("60.00", folder)


def test_the_best_is_the_most_for_scores_and_the_least_for_costs(make_run, table):
    make_run(method="lora", rouge=70.0, trainable=1000, seconds=50.0)
    make_run(method="prefix", rouge=60.0, trainable=2000, seconds=40.0)
    lora, prefix = table()["qwen", "lora"], table()["qwen", "prefix"]
    assert [title for title, entry in lora.items() if entry.best] == [
        "ROUGE-1",
        "ROUGE-2",
        "ROUGE-L",
        "trainable",
        "share %",
    ]
    assert [title for title, entry in prefix.items() if entry.best] == ["train s", "tokens/s"]


def test_training_nothing_wins_no_cost(make_run, table):
    make_run(method="none", rouge=80.0, trainable=0, seconds=0.1)
    make_run(method="lora", trainable=1000)
    make_run(method="prefix", trainable=2000)
    assert [title for title, entry in table()["qwen", "none"].items() if entry.best] == [
        "ROUGE-1",
        "ROUGE-2",
        "ROUGE-L",
    ]
    assert table()["qwen", "lora"]["trainable"].best


def test_what_reads_equal_is_marked_equally_and_all_equal_not_at_all(make_run, table):
    for method, rouge in (("dora", 70.001), ("lora", 70.0), ("prefix", 60.0)):
        make_run(method=method, rouge=rouge, trainable=1000)
    rows = table()
    assert [rows["qwen", method]["ROUGE-1"].best for method in ("dora", "lora", "prefix")] == [True, True, False]
    assert not rows["qwen", "lora"]["trainable"].best


@pytest.mark.parametrize(
    ("state", "word"),
    [("failed", "failed"), ("unsupported", "n/a"), ("running", "running"), ("unfinished", "unfinished")],
)
def test_a_cell_without_scores_says_why(make_run, multirun, table, state, word):
    folder = make_run(state=state, reason="because")
    assert table()["qwen", "lora"]["ROUGE-1"].text == word
    [reasons] = reasons_tables(to_cells(read_all(multirun)[0]))
    assert reasons.rows[0][4].folder == folder


def test_a_failed_seed_does_not_hide_the_others(make_run, table, multirun):
    make_run(seed=1, rouge=60.0)
    make_run(seed=2, state="failed", reason="disk full")
    row = table()["qwen", "lora"]
    assert (row["ROUGE-1"].text, row["seeds"].text) == ("60.00", "1 of 2")
    [reasons] = reasons_tables(to_cells(read_all(multirun)[0]))
    assert [entry.text for entry in reasons.rows[0]] == ["clinic", "qwen", "lora", "2", "failed", "error: disk full"]


def test_a_table_per_task_and_kind_of_rows(make_run, multirun):
    make_run(task="clinic", tasks=("NER", "REPORT"))
    make_run(task="promptcblue", tasks=("CHIP-STS",))
    cells = to_cells(read_all(multirun)[0])
    assert [table.title for table in study_tables(cells, convention="words")] == [
        "clinic", "clinic: health of the output", "clinic: overfitting", "clinic: other scores", "clinic: NER", "clinic: REPORT",
        "promptcblue", "promptcblue: health of the output", "promptcblue: overfitting", "promptcblue: other scores", "promptcblue: CHIP-STS",
    ]  # fmt: skip
    assert reasons_tables(cells) == []


MORE = {
    "loss": {"train": 0.2, "valid": 1.5, "best_train": 0.6, "best_valid": 1.25, "best_step": 20},
    "forgetting": {"base": 3.0, "tuned": 3.5},
    "rewording": {"rouge-1 drop": 4.25},
    "checks": {
        "adapter took effect": {"ok": False, "note": "logits <b>equal</b>"},
        "loss fell": {"ok": True, "note": ""},
    },
}


def by_title(cells):
    return {table.title: table for table in [*study_tables(cells, convention="words"), *checks_tables(cells)]}


def test_overfitting_forgetting_rewording_and_checks_are_told_where_a_run_has_them(make_run, multirun):
    make_run(method="none")
    make_run(method="lora", more=MORE)
    found = by_title(to_cells(read_all(multirun)[0]))
    for title, expected in (
        ("clinic: overfitting", {"valid loss": "1.5", "best valid loss": "1.25", "rise since best": "0.25", "best step": "20"}),
        ("clinic: forgetting and rewording", {"general loss before": "3", "forgetting": "0.5", "rouge-1 drop": "4.25"}),
        ("Failed checks", {"check": "adapter took effect", "what it found": "logits <b>equal</b>"}),
    ):  # fmt: skip
        row = next(row for row in found[title].rows if row[0].text == "clinic" or row[1].text == "lora")
        shown = dict(zip(found[title].header, (entry.text for entry in row), strict=True))
        assert expected.items() <= shown.items()
    assert len(found["Failed checks"].rows) == 1


@pytest.mark.parametrize("more", [{}, {"forgetting": [1], "rewording": None, "checks": {"x": 3, "y": {"ok": None}}}])
def test_what_no_run_has_is_not_shown(make_run, multirun, more):
    make_run(more=more)
    found = by_title(to_cells(read_all(multirun)[0]))
    assert "clinic: forgetting and rewording" not in found
    assert "Failed checks" not in found


def test_what_is_wrong_with_many_answers_is_marked(make_run, multirun):
    make_run(tasks=())
    entries = by_title(to_cells(read_all(multirun)[0]))["clinic: health of the output"].rows[0]
    assert [entry.alarm for entry in entries[3:]] == [False, False, False]
    folder = make_run(method="prefix")
    record = json.loads((folder / "scores.json").read_text())
    record["scores"]["mean"]["looping"] = 60.0
    (folder / "scores.json").write_text(json.dumps(record))
    entries = by_title(to_cells(read_all(multirun)[0]))["clinic: health of the output"].rows[1]
    assert [entry.alarm for entry in entries[3:]] == [False, False, True]


def test_what_was_counted_of_the_data_is_one_line_for_runs_that_read_them_alike(make_run, multirun):
    notes = {
        "train": 10,
        "valid": 4,
        "bad": 1,
        "skipped": 0,
        "duplicates": 2,
        "leaks": 3,
        "dropped": 0,
        "prompts_cut": 5,
        "beyond_positions": 6,
    }
    for method, seed in (("lora", 1), ("lora", 2), ("prefix", 1)):
        path = make_run(method=method, seed=seed) / "environment.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"notes": notes}))
    make_run(method="none", seed=1)  # made before anything was counted
    [found] = data_tables(to_cells(read_all(multirun)[0]))
    [line] = [[entry.text for entry in row] for row in found.rows]
    assert line == ["clinic", "qwen", "10", "4", "1", "0", "2", "3", "0", "5", "–", "6"]
    assert found.title == "Data"
    assert len(found.header) == len(line)


def test_no_counts_no_table(make_run, multirun):
    make_run()
    assert data_tables(to_cells(read_all(multirun)[0])) == []
