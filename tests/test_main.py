"""The command line on real processes: grids of tiny cells on a base that is made here."""

import json
import signal
import time

import psutil
import pytest
from grids import ENDLESS, ROOT, descendants, failure, folders, processes_in, still_running, wait_for_file

from finetune.runs import state


def times(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def test_a_grid_is_not_run_twice(command, tmp_path):
    words = ("-m", "method=none,lora,prompt,prefix", "optim.lr=1e-3")
    first = command(*words)
    assert first.returncode == 0, first.stderr
    found = folders(tmp_path)
    assert len(found) == 4
    for folder in found:
        names = {path.name for path in folder.iterdir()}
        assert {"config.yaml", "environment.json", "run.log", "predictions.jsonl", "scores.json"} <= names
        assert "owner.json" not in names
        scores = json.loads((folder / "scores.json").read_text())
        assert scores["scores"]["mean"]["num_rows"] == 6
        assert json.loads((folder / "environment.json").read_text())["padding_free"]
    before = times(tmp_path / "multirun")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "torch.py").write_text("raise SystemExit('torch was imported')\n")
    again = command(*words, PYTHONPATH=f"{tmp_path / 'broken'}:{ROOT}")
    assert again.returncode == 0, again.stderr
    assert "4 done" in again.stderr
    assert again.stderr.count("seed1 done before") == 4 > first.stderr.count("done before")
    assert times(tmp_path / "multirun") == before


def test_a_failed_cell_is_named_and_the_others_run(command, tmp_path):
    result = command("-m", "method=lora", "model.linear=[nowhere],[q_proj]")
    assert result.returncode == 1
    assert "nowhere" in result.stderr
    assert "Traceback" not in result.stderr
    assert sorted((folder / "scores.json").exists() for folder in folders(tmp_path)) == [False, True]
    [failure] = tmp_path.glob("multirun/main/*/*/*/seed1/failure.json")
    assert json.loads(failure.read_text())["kind"] == "error"


def test_methods_that_only_ask_the_base(command, tmp_path):
    result = command("-m", "method=few_shot,decoder_tuning", "method.lr.tiny=1e-2")
    assert result.returncode == 0, result.stderr
    for folder in folders(tmp_path):
        found = json.loads((folder / "scores.json").read_text())
        assert list(found["checks"]) == ["weights", "logits", "loss", "cache", "reload", "method"]
        assert found["checks"]["weights"]["ok"]
        assert found["forgetting"]["base"] == found["forgetting"]["tuned"]
        choosing = "decoder_tuning" in str(folder)
        assert found["rewording"]["num_rows"] == (2 if choosing else 6)
        assert ("unsupported_tasks" in found) == choosing
    assert command("method=decoder_tuning", "task.only=[CLINIC-NER]", "study=none").returncode == 0
    [reason] = tmp_path.glob("multirun/none/*/*/*/seed1/unsupported.json")
    assert "needs a list of choices" in reason.read_text()
    assert not list(reason.parent.glob("failure*.json"))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["task=jsonl", "task.source.path=missing.jsonl"], "missing.jsonl"),
        (["task=jsonl", "task.source.path=bad.jsonl"], "bad.jsonl"),
        (["model=qwenn"], "did you mean qwen"),
        (["method.adapter.rank=3"], "rank"),
        (["+optim.optimizer.weight_decy=0.1"], "did you mean weight_decay"),
        (["optim.optimizer._target_=torch.optim.Adamw"], "did you mean AdamW"),
    ],
    ids=["missing-file", "row-without-target", "unknown-model", "argument", "optimizer-argument", "optimizer"],
)
def test_nothing_starts_on_bad_input(command, tmp_path, words, said):
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a", "target": "b"}\n{"prompt": "c"}\n')
    result = command(*words)
    assert result.returncode == 2
    assert said in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "multirun").exists()


def test_a_base_that_cannot_be_fetched_fails_its_cell_quickly(command, tmp_path):
    began = time.monotonic()
    result = command("model.path=nobody/nothing", HF_ENDPOINT="http://127.0.0.1:9", HF_HUB_OFFLINE="0")
    assert result.returncode == 1
    assert "nobody/nothing" in result.stderr.replace("\n", "")
    assert "Traceback" not in result.stderr
    assert time.monotonic() - began < 120


@pytest.mark.parametrize(
    ("number", "status"),
    [(signal.SIGTERM, 75), (signal.SIGUSR1, 75), (signal.SIGINT, 130), (signal.SIGKILL, -9)],
    ids=["terminated", "warned-by-slurm", "interrupted", "killed"],
)
def test_no_orphans_when_the_sweep_ends_early(command, tmp_path, number, status):
    sweep = command("-m", "method=lora,prompt", *ENDLESS, start=True)
    wait_for_file(tmp_path, "multirun/*/*/*/*/seed1/steps.jsonl", while_runs=sweep)
    below = descendants(sweep)
    sweep.send_signal(number)
    errors = sweep.communicate(timeout=60)[1]
    assert sweep.returncode == status
    assert "Traceback" not in errors
    assert still_running(below) == []
    assert processes_in(tmp_path) == {}
    for folder in folders(tmp_path) if number != signal.SIGKILL else ():
        assert failure(folder)["kind"] == "interrupted"
        assert state(folder) == "unfinished"
        assert not (folder / "owner.json").exists()


def test_a_second_interrupt_ends_at_once(command, tmp_path, fault):
    """A job that hears no SIGTERM gets forty seconds, unless the person has none."""
    sweep = command("method=lora", *ENDLESS, start=True, **fault(**{"steps.jsonl": "deaf"}))
    wait_for_file(tmp_path, "multirun/*/*/*/*/seed1/steps.jsonl", while_runs=sweep)
    below = descendants(sweep)
    sweep.send_signal(signal.SIGINT)
    time.sleep(2)
    assert sweep.poll() is None
    began = time.monotonic()
    sweep.send_signal(signal.SIGINT)
    errors = sweep.communicate(timeout=60)[1]
    assert time.monotonic() - began < 15
    assert sweep.returncode == 130
    assert "Traceback" not in errors
    assert still_running(below) == []
    [folder] = folders(tmp_path)
    assert failure(folder)["kind"] == "interrupted"


def test_two_ranks_train_as_one(command, tmp_path):
    common = ("method=lora", "optim.batch_rows=4", "optim.max_steps=4", "optim.validations=1")
    assert command(*common, "study=one").returncode == 0
    two = command(*common, "study=two", "launch.num_processes=2")
    assert two.returncode == 0, two.stderr
    one, two = (
        [
            json.loads(line)
            for line in next(tmp_path.glob(f"multirun/{study}/*/*/*/seed1/steps.jsonl")).read_text().splitlines()
        ]
        for study in ("one", "two")
    )
    assert len(one) == len(two) == 4
    for a, b in zip(one, two, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-5)
    assert two[-1]["valid_loss"] == pytest.approx(one[-1]["valid_loss"], rel=1e-5)
    answers = [
        [
            json.loads(line)["prediction"]
            for line in next(tmp_path.glob(f"multirun/{study}/*/*/*/seed1/predictions.jsonl")).open()
        ]
        for study in ("one", "two")
    ]
    assert answers[0] == answers[1]


@pytest.mark.parametrize("launch", ["process", "worker"])
def test_a_killed_worker_loses_one_cell(command, tmp_path, launch):
    sweep = command("-m", "method=lora,none", *ENDLESS, f"launch={launch}", "launch.jobs=1", start=True)
    wait_for_file(tmp_path, "multirun/*/*/*/lora*/seed1/steps.jsonl", while_runs=sweep)
    [worker] = psutil.Process(sweep.pid).children()
    worker.kill()
    sweep.communicate(timeout=120)
    assert sweep.returncode == 1
    [folder] = tmp_path.glob("multirun/*/*/*/lora*/seed1")
    assert failure(folder)["kind"] == "killed"
    assert len(list(tmp_path.glob("multirun/*/*/*/none*/seed1/scores.json"))) == 1
    assert processes_in(tmp_path) == {}
