from finetune.reporting.cells import done, to_cells, with_short_names
from finetune.reporting.read import read_all


def cells_of(multirun):
    return to_cells(read_all(multirun)[0])


def test_seeds_are_one_cell_in_order(make_run, multirun):
    for seed in (10, 9, 1):
        make_run(seed=seed)
    [cell] = cells_of(multirun)
    assert [run.seed for run in cell.runs] == ["1", "9", "10"]


def test_the_untouched_base_comes_first(make_run, multirun):
    for method in ("prefix", "none", "full", "none+optim.seed=3"):
        make_run(method=method)
    assert [cell.method for cell in cells_of(multirun)] == ["none", "none+optim.seed=3", "full", "prefix"]


def test_other_base_weights_are_another_row(make_run, multirun):
    make_run(seed=1, weights="aaaaaaaaaa")
    make_run(seed=2, weights="bbbbbbbbbb")
    make_run(model="llama", weights="cccccccccc")
    assert [cell.model for cell in cells_of(multirun)] == [
        "llama",
        "qwen (weights aaaaaaaa)",
        "qwen (weights bbbbbbbb)",
    ]


def test_unknown_weights_are_not_taken_for_the_same(make_run, multirun):
    make_run(seed=1)
    (make_run(seed=2) / "environment.json").unlink()
    assert [cell.model for cell in cells_of(multirun)] == ["qwen (weights unknown)", "qwen (weights wwwwwwww)"]


def test_a_run_that_failed_before_it_knew_its_weights_stays_with_the_others(make_run, multirun):
    make_run(seed=1)
    (make_run(seed=2, state="failed") / "environment.json").unlink()
    [cell] = cells_of(multirun)
    assert [run.seed for run in done(cell)] == ["1"]


def test_what_every_method_has_is_in_no_name(make_run, multirun):
    for method in ("none+optim.epochs=1", "lora+adapter.r=8+optim.epochs=1"):
        make_run(method=method)
    cells, shared = with_short_names(to_cells(read_all(multirun)[0]))
    assert [cell.method for cell in cells] == ["none", "lora+adapter.r=8"]
    assert shared == ["optim.epochs=1"]
    assert with_short_names(cells[1:]) == (cells[1:], [])
