import pytest

from finetune.reporting import columns as shown_columns
from finetune.reporting.cells import to_cells
from finetune.reporting.read import read_all
from finetune.reporting.tables import make_table, reasons_tables, study_tables


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
        "clinic", "clinic: health of the output", "clinic: other scores", "clinic: losses", "clinic: NER", "clinic: REPORT",
        "promptcblue", "promptcblue: health of the output", "promptcblue: other scores", "promptcblue: losses", "promptcblue: CHIP-STS",
    ]  # fmt: skip
    assert reasons_tables(cells) == []
