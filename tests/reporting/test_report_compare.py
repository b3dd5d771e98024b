"""Which differences are real, from run folders whose row scores are known."""

import random

import pytest
from report_runs import row

from finetune.reporting.cells import to_cells
from finetune.reporting.compare import compare_cells, transfer
from finetune.reporting.read import read_all
from finetune.reporting.rows import read_scores
from finetune.reporting.standings import standing_tables


@pytest.fixture
def comparisons(multirun):
    def make(score="rouge-l"):
        runs, _ = read_all(multirun)
        rows = read_scores([run.folder for run in runs], score=score)
        return compare_cells(to_cells(runs), rows=rows, score=score)

    return make


@pytest.fixture
def make_method(make_run):
    """A run whose rows score about `level`; the rows that are hard are the same for all."""

    def make(method, level, *, num_rows=200, noise=3.0, task_rows="NER", **names):
        hard, own = random.Random(0), random.Random(f"{method}{names}")
        scores = [level + hard.gauss(0, 10) + own.gauss(0, noise) for _ in range(num_rows)]
        rows = [row(number, score, task=task_rows) for number, score in enumerate(scores)]
        return make_run(method=method, rows=rows, **names)

    return make


def places(comparison):
    return {standing.cell.method: standing.place for standing in comparison.standings}


def test_what_is_not_distinguishable_from_the_best_is_a_tie(make_method, comparisons):
    for method, level in (("none", 20), ("lora", 60.0), ("dora", 60.1), ("prefix", 50)):
        make_method(method, level)
    [comparison] = comparisons()
    found = places(comparison)
    assert sorted(found[method] for method in ("lora", "dora")) == ["best", "tie"]
    assert found["prefix"] == found["none"] == ""
    assert comparison.num_rows == 200


def test_gains_over_the_base_and_the_share_of_full(make_method, comparisons):
    for method, level in (("none", 20), ("lora", 50), ("full", 60)):
        make_method(method, level, noise=0.1)
    [comparison] = comparisons()
    lora = next(standing for standing in comparison.standings if standing.cell.method == "lora")
    assert lora.delta == pytest.approx(30, abs=0.1)
    assert lora.delta_interval[0] < 30 < lora.delta_interval[1] or lora.delta_interval == pytest.approx(
        (30, 30), abs=0.1
    )
    assert lora.share == pytest.approx(75, abs=1)
    none = next(standing for standing in comparison.standings if standing.cell.method == "none")
    assert (none.delta, none.share) == (None, None)


def test_no_share_of_a_gain_that_full_does_not_have(make_method, comparisons):
    for method, level in (("none", 50), ("lora", 60), ("full", 50)):
        make_method(method, level)
    [comparison] = comparisons()
    assert all(standing.share is None for standing in comparison.standings)


def test_the_base_with_the_same_overrides_is_the_one_to_compare_with(make_method, comparisons):
    for method, level in (("none", 20), ("none+optim.epochs=1", 30), ("lora+optim.epochs=1", 50)):
        make_method(method, level, noise=0.01)
    [comparison] = comparisons()
    deltas = {standing.cell.method: standing.delta for standing in comparison.standings}
    assert deltas["lora+optim.epochs=1"] == pytest.approx(20, abs=0.1)


def test_seeds_are_averaged_by_row(make_run, comparisons):
    make_run(method="lora", seed=1, rows=[row(1, 0), row(2, 100)])
    make_run(method="lora", seed=2, rows=[row(2, 50), row(1, 50)])
    [comparison] = comparisons()
    [standing] = comparison.standings
    assert standing.mean == 50
    assert standing.interval == (25, 75)  # rows 25 and 75


def test_kinds_of_rows_count_equally(make_run, comparisons):
    make_run(rows=[row(1, 0, task="A")] + [row(number, 90, task="B") for number in range(9)])
    [comparison] = comparisons()
    assert comparison.standings[0].mean == 45


def test_only_shared_rows_are_compared(make_run, comparisons):
    make_run(method="lora", rows=[row(1, 10), row(2, 20), row(3, 90)])
    make_run(method="prefix", rows=[row(3, 80), row(1, 0)])
    [comparison] = comparisons()
    assert comparison.num_rows == 2
    assert [standing.mean for standing in comparison.standings] == [50, 40]


def test_bases_and_tasks_are_compared_apart(make_method, comparisons):
    for model in ("llama", "qwen"):
        for task in ("clinic", "jsonl"):
            make_method("lora", 50, model=model, task=task)
    found = [(comparison.task, comparison.model) for comparison in comparisons()]
    assert found == [("clinic", "llama"), ("clinic", "qwen"), ("jsonl", "llama"), ("jsonl", "qwen")]


def test_rows_in_other_words_and_broken_lines_do_not_count(make_run, comparisons):
    folder = make_run(rows=[row(1, 10), row(1, 90, template=1), row(2, "x"), row(3, 30)])
    with (folder / "predictions.jsonl").open("a") as file:
        file.write('{"id": "4", "ta')
    [comparison] = comparisons()
    assert (comparison.num_rows, comparison.standings[0].mean) == (2, 20)


def test_runs_without_predictions_are_not_compared(make_run, comparisons):
    make_run()
    assert comparisons() == []


def test_does_the_winner_transfer(make_method, comparisons):
    for model, order in (("llama", ("none", "prefix", "lora", "full")), ("qwen", ("none", "prefix", "full", "lora"))):
        for level, method in enumerate(order):
            make_method(method, 20 * level, model=model)
    [found] = transfer(comparisons())
    assert found == ("clinic", "llama", "qwen", 4, pytest.approx(0.8))


def test_columns_without_a_number_are_left_out(make_method, comparisons):
    for method, level in (("lora", 60), ("prefix", 50)):
        make_method(method, level, noise=0.1)
    assert standing_tables(comparisons())[0].header[-1] == "place"
    for method, level in (("none", 20), ("full", 70)):
        make_method(method, level, noise=0.1)
    assert standing_tables(comparisons())[0].header[-1] == "% of full's gain"


def test_tables(make_method, comparisons):
    for method, level in (("none", 20), ("lora", 60), ("prefix", 50)):
        make_method(method, level, noise=0.1)
    standings, differences = standing_tables(comparisons())
    shown = {row[1].text: [entry.text for entry in row[2:]] for row in standings.rows}
    assert standings.header[3] == "ROUGE-L"
    assert standings.header[-2:] == ("gain over none", "95 %")  # no share of full's gain without full
    assert shown["none"][-2:] == ["–", "–"]
    assert shown["lora"][3] == "best"
    assert shown["lora"][-2].startswith("+")
    [row] = [row for row in differences.rows if row[0].text == "lora"]
    assert dict(zip(differences.header, [entry.text for entry in row], strict=True))["prefix"].startswith("+")
    assert row[-1].text.endswith("*")
