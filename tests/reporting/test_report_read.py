import json

import pytest

from finetune.reporting.read import read, read_all


def test_a_done_run_gives_its_numbers(make_run, multirun):
    folder = make_run(task="clinic+task.train_rows=50", model="qwen", method="lora+adapter.r=8", seed=2, rouge=61.25)
    [run], left_out = read_all(multirun)
    assert left_out == []
    assert (run.study, run.task, run.model) == ("main", "clinic+task.train_rows=50", "qwen")
    assert (run.method, run.seed, run.state, run.folder) == ("lora+adapter.r=8", "2", "done", folder)
    assert (run.scores["mean"]["rouge-1"], run.scores["NER"]["rouge-l"]) == (61.25, 61.25)
    assert run.cost["trainable_parameters"] == 1_234_567
    assert "peak_memory_gib" not in run.cost  # null: not measured


@pytest.mark.parametrize(
    ("state", "reason", "expected"),
    [
        ("failed", "no memory left", "error: no memory left"),
        ("unsupported", "the base has no bias", "the base has no bias"),
        ("running", "", "node7: 12"),
        ("unfinished", "", "stopped before the end; the same command goes on with it"),
    ],
)
def test_other_states_give_a_reason(make_run, state, reason, expected):
    run = read(make_run(state=state, reason=reason))
    assert (run.state, run.reason, run.scores) == (state, expected, {})


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        pytest.param("scores.json", b'{"scores": {"me', "scores.json: Unterminated string", id="half written"),
        pytest.param("scores.json", b"", "scores.json: Expecting value", id="empty"),
        pytest.param("scores.json", b"[1, 2]", "scores.json: holds no mapping", id="a list"),
        pytest.param("scores.json", b'{"scores": [1]}', "scores.json: scores.mean is missing", id="other shape"),
        pytest.param("scores.json", b"\xff\xfe{}\x00", "scores.json", id="not UTF-8"),
        pytest.param("scores.json", b"[" * 200_000, "recursion", id="nested too deep"),
        pytest.param("config.yaml", b"model: {name: qw", "config.yaml: ", id="half a configuration"),
        pytest.param("config.yaml", b"", "config.yaml: holds no mapping", id="no configuration"),
        pytest.param("config.yaml", b"seed: 1", "config.yaml: task.name is missing", id="names missing"),
        pytest.param("config.yaml", b"a: !!python/object:os.system {}", "config.yaml: ", id="a Python object"),
        pytest.param("config.yaml", b"\x00\x01", "config.yaml: ", id="not text"),
    ],
)
def test_a_corrupt_folder_is_left_out_with_its_reason(make_run, multirun, name, content, expected):
    make_run(method="lora")
    (make_run(method="broken") / name).write_bytes(content)
    [run], [left_out] = read_all(multirun)
    assert (run.method, left_out.folder.parent.name) == ("lora", "broken")
    assert expected in left_out.reason


@pytest.mark.parametrize("content", [b"", b"[]", b'{"hashes": 1}', b'{"hashes": {"weights": [1', b"\xff"])
def test_a_broken_environment_only_loses_the_hashes(make_run, content):
    folder = make_run()
    (folder / "environment.json").write_bytes(content)
    run = read(folder)
    assert (run.state, run.weights, run.data) == ("done", None, None)


def test_numbers_that_are_none_are_not_there(make_run):
    folder = make_run()
    record = json.loads((folder / "scores.json").read_text())
    record["scores"]["mean"] |= {"rouge-1": float("nan"), "rouge-2": "high", "exact": None, "empty": True}
    record["cost"] = None
    (folder / "scores.json").write_text(json.dumps(record))
    run = read(folder)
    assert run.scores["mean"].keys() & {"rouge-1", "rouge-2", "rouge-l", "exact", "empty"} == {"rouge-l"}
    assert run.cost == {}


def test_a_directory_where_a_file_should_be_is_left_out(make_run, multirun):
    folder = make_run()
    (folder / "scores.json").unlink()
    (folder / "scores.json").mkdir()
    runs, [left_out] = read_all(multirun)
    assert (runs, left_out.folder) == ([], folder)


def test_a_run_made_by_hand_has_its_names_from_the_configuration(tmp_path):
    (tmp_path / "config.yaml").write_text("{task: {name: clinic}, model: {name: qwen}, method: {name: lora}, seed: 3}")
    run = read(tmp_path)
    assert (run.task, run.model, run.method, run.seed, run.state) == ("clinic", "qwen", "lora", "3", "unfinished")


def test_the_configuration_that_wandb_keeps_inside_a_run_is_no_run(make_run, multirun):
    inside = make_run() / "wandb" / "offline-run-1" / "files"
    inside.mkdir(parents=True)
    (inside / "config.yaml").write_text("{}")
    runs, left_out = read_all(multirun)
    assert (len(runs), left_out) == (1, [])


def test_an_owner_that_is_no_mapping_costs_only_its_folder(make_run, multirun):
    make_run(method="lora")
    (make_run(method="prefix", state="running") / "owner.json").write_text("[]")
    runs, left_out = read_all(multirun)
    assert len(runs) + len(left_out) == 2
