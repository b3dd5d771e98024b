import json

import pytest

from finetune import claims, runs

CONFIG = {"study": "main", "seed": 3, "model": {"name": "qwen"}, "method": {"name": "lora"}, "task": {"name": "clinic"}}


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([], ("clinic", "qwen", "lora")),
        (["model=qwen", "method=lora", "task=clinic", "seed=3", "study=x"], ("clinic", "qwen", "lora")),
        (["method.adapter.r=8"], ("clinic", "qwen", "lora+adapter.r=8")),
        (["task.train_rows=10", "model.precision=float16"], ("clinic+train_rows=10", "qwen+precision=float16", "lora")),
        (["optim.epochs=1", "scale=small"], ("clinic", "qwen", "lora+optim.epochs=1+scale=small")),
        (["scale=tiny", "optim=adamw", "launch.num_processes=2", "wandb.mode=disabled"], ("clinic", "qwen", "lora")),
        (["+experiment=original"], ("clinic", "qwen", "lora")),
        (["task.source.path=/data/2024/rows.jsonl"], ("clinic+source.path=rows.jsonl", "qwen", "lora")),
    ],
    ids=["plain", "choices", "adapter", "owners", "others", "defaults", "experiment", "data-may-move"],
)
def test_names_say_what_is_not_the_default(overrides, expected):
    assert runs.names(CONFIG, overrides) == expected


@pytest.mark.parametrize("path", ["../../etc", "a b/c", "模型/路径" * 30, "x" * 300, "..", "/abs/olute", "a\nb\0c"])
def test_a_hostile_path_stays_inside_the_study(path, tmp_path):
    folder = runs.folder(tmp_path, CONFIG, [f"model.path={path}"])
    assert folder.resolve().is_relative_to((tmp_path / "main").resolve())
    assert len(folder.relative_to(tmp_path).parts) == 5
    assert all(len(part.encode()) < 100 and part.isprintable() for part in folder.relative_to(tmp_path).parts)
    folder.mkdir(parents=True)


def test_long_names_that_differ_stay_different():
    one, two = (runs.names(CONFIG, [f"model.path={'x' * 200}{n}"]) for n in (1, 2))
    assert one != two


def test_the_files_are_the_state(tmp_path):
    assert runs.state(tmp_path) == "unfinished"
    claims.take(tmp_path)
    runs.begin(tmp_path, CONFIG)
    assert runs.state(tmp_path) == "running"
    claims.release(tmp_path)
    runs.fail(tmp_path, kind="error", message="no")
    assert runs.state(tmp_path) == "failed"
    runs.begin(tmp_path, CONFIG)
    runs.fail(tmp_path, kind="interrupted", message="no fault of the run")
    runs.fail(tmp_path, kind="killed", message="an echo of it")
    assert runs.state(tmp_path) == "unfinished"
    runs.write_json(tmp_path / "scores.json", {})
    assert runs.state(tmp_path) == "done"
    assert runs.read_config(tmp_path) == CONFIG


def test_failures_are_kept(tmp_path):
    for message in ("first", "second", "third"):
        claims.take(tmp_path)
        runs.begin(tmp_path, CONFIG)
        runs.fail(tmp_path, kind="error", message=message)
        runs.fail(tmp_path, kind="error", message="an echo of the same attempt")
        claims.release(tmp_path)
    kept = [runs.read_json(tmp_path / f"failure{n}.json")["message"] for n in (".1", ".2", "")]
    assert kept == ["first", "second", "third"]


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "scores.json"
    runs.write_json(path, {"a": 1})
    with pytest.raises(ValueError, match="JSON"):
        runs.write_json(path, {"a": float("nan")})
    assert runs.read_json(path) == {"a": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["scores.json"]


def test_lone_surrogates_survive(tmp_path):
    runs.append_lines(tmp_path / "predictions.jsonl", [{"prediction": "a\ud800\0"}])
    assert json.loads((tmp_path / "predictions.jsonl").read_text()) == {"prediction": "a\ud800\0"}


def test_find_lists_run_folders(tmp_path):
    run = runs.folder(tmp_path, CONFIG, [])
    run.mkdir(parents=True)
    runs.begin(run, CONFIG)
    (tmp_path / "main" / "wandb").mkdir()
    assert runs.find(tmp_path) == [run]
