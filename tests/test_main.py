"""The command line on real processes: grids of tiny cells on a base that is made here."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from report_runs import write_base

ROOT = Path(__file__).parent.parent
QUICK = (
    "optim.max_steps=3",
    "task.train_rows=12",
    "task.valid_rows=6",
    "wandb.mode=disabled",
    "evaluate.max_new_tokens=4",
)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A random Qwen2 base as a folder."""
    return write_base(tmp_path_factory.mktemp("base"))


def _from_a_terminal():
    """A shell starts what runs in the background with Ctrl-C ignored; a person's command is not."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.fixture
def command(tmp_path, base):
    """Runs `python -m finetune` in an empty folder on the tiny base."""

    def run(*words, start=False, **environment):
        line = [sys.executable, "-m", "finetune", *QUICK, f"model.path={base}", "model.linear=[q_proj,v_proj]", *words]
        known = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
        how = {"cwd": tmp_path, "env": known, "stderr": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        how["preexec_fn"] = _from_a_terminal
        if not start:
            return subprocess.run(line, check=False, timeout=300, **how)
        started.append(subprocess.Popen(line, **how))
        return started[-1]

    started = []
    yield run
    for process in started:
        process.kill()


def folders(tmp_path):
    return [path.parent for path in sorted(tmp_path.glob("multirun/*/*/*/*/seed*/config.yaml"))]


def processes_in(folder):
    """The processes that work in a folder, with their command lines."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if (process / "cwd").readlink() == folder:
                found[process] = (process / "cmdline").read_text()
    return found


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
    again = command(*words)
    assert again.returncode == 0
    assert "4 done" in again.stderr
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
    ],
    ids=["missing-file", "row-without-target", "unknown-model", "unknown-argument"],
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
    ("number", "status", "wait"),
    [(signal.SIGTERM, 75, "train"), (signal.SIGINT, 130, "train"), (signal.SIGKILL, -9, "train")],
    ids=["terminated", "interrupted", "killed"],
)
def test_no_orphans_when_the_sweep_ends_early(command, tmp_path, number, status, wait):
    sweep = command("-m", "method=lora,prompt", "optim.max_steps=100000", start=True)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("multirun/*/*/*/*/seed1/steps.jsonl")):
        assert time.monotonic() < deadline
        assert sweep.poll() is None, sweep.communicate()
        time.sleep(0.2)
    sweep.send_signal(number)
    sweep.communicate(timeout=60)
    assert sweep.returncode == status
    time.sleep(1 if number == signal.SIGKILL else 0)
    assert processes_in(tmp_path) == {}
    [folder] = folders(tmp_path)
    if number != signal.SIGKILL:
        assert json.loads((folder / "failure.json").read_text())["kind"] == "interrupted"
        assert not (folder / "owner.json").exists()


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


def test_a_wrong_number_of_processes_is_refused(tmp_path, base, command):
    assert command("method=none").returncode == 0
    [folder] = folders(tmp_path)
    (folder / "scores.json").unlink()
    text = (folder / "config.yaml").read_text().replace("num_processes: 1", "num_processes: 3")
    (folder / "config.yaml").write_text(text)
    job = [sys.executable, "-m", "finetune.train", str(folder)]
    result = subprocess.run(job, capture_output=True, text=True, check=False, cwd=ROOT)
    assert result.returncode == 1
    assert "launch.num_processes=3, but 1" in result.stdout


def test_a_killed_worker_loses_one_cell(command, tmp_path):
    sweep = command(
        "-m", "method=lora,none", "optim.max_steps=100000", "optim.epochs=1000", "launch.jobs=1", start=True
    )
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("multirun/*/*/*/lora*/seed1/steps.jsonl")):
        assert time.monotonic() < deadline
        time.sleep(0.2)
    [worker] = psutil.Process(sweep.pid).children()
    worker.kill()
    sweep.communicate(timeout=120)
    assert sweep.returncode == 1
    [failure] = tmp_path.glob("multirun/*/*/*/lora*/seed1/failure.json")
    assert json.loads(failure.read_text())["kind"] == "killed"
    assert len(list(tmp_path.glob("multirun/*/*/*/none*/seed1/scores.json"))) == 1
    assert processes_in(tmp_path) == {}
