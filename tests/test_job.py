"""Real jobs on real files, killed and asked to end; each goes on to the scores of the undisturbed run."""

import contextlib
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from hydra._internal.utils import get_args_parser
from report_runs import write_base
from safetensors.torch import load_file, save_file

from finetune import checkpoint, runs
from finetune.cells import cells
from finetune.job import beyond_positions

ROOT = Path(__file__).parent.parent
LORA = ("method=lora", "method.adapter.lora_dropout=0.2")
QUICK = (
    "optim.epochs=3",
    "optim.max_steps=8",
    "optim.lr=1e-2",
    "optim.accumulation=2",
    "task.train_rows=24",
    "task.valid_rows=12",
    "wandb.mode=disabled",
    "evaluate.max_new_tokens=3",
    "evaluate.rewording_rows=0",
    "evaluate.batch_rows=4",
    "evaluate.forgetting_text=null",
    "launch.checkpoint_minutes=0",
    "launch.device=cpu",
    "model.linear=[q_proj,v_proj]",
)


def compose(run, base, *words):
    """A folder as the sweep leaves it to a job."""
    words = words if any(word.startswith("method=") for word in words) else (*LORA, *words)
    [cell] = cells(get_args_parser().parse_intermixed_args([*QUICK, f"model.path={base}", *words]), root=run)
    run.mkdir(parents=True, exist_ok=True)
    runs.write_text(run / "config.yaml", json.dumps(cell.config))
    return run


class Job:
    """A job at work."""

    def __init__(self, process, run, *, ranks=1, slow=0.0, room=0, narrow=0):
        self.process, self.run = process, run
        asked = {"run": str(run), "ranks": ranks, "slow": slow, "room": room, "narrow": narrow}
        process.stdin.write(json.dumps(asked) + "\n")
        process.stdin.flush()
        self.pids = json.loads(process.stdout.readline())
        self.statuses = []

    def wait_for(self, happened):
        deadline = time.monotonic() + 90
        while not happened(self.run):
            assert any(map(psutil.pid_exists, self.pids)), self.log()
            assert time.monotonic() < deadline
            time.sleep(0.005)

    def send(self, number):
        for pid in self.pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def log(self):
        file = self.run / "run.log"
        return file.read_text() if file.exists() else ""

    def wait(self):
        """Exit statuses of the ranks."""
        self.statuses = self.statuses or json.loads(self.process.stdout.readline())
        return self.statuses


@pytest.fixture(scope="module")
def start():
    """`start(run, ranks=, slow=, room=, narrow=)` begins a job, forked from a process that has imported all it needs."""
    known = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-m", "slow_jobs"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    begun = []

    def begin(run, **how):
        for job in begun[-1:]:
            if not job.statuses:  # of a test that failed
                job.send(signal.SIGKILL)
                job.wait()
        begun.append(Job(process, run, **how))
        return begun[-1]

    with subprocess.Popen(words, env=known, **pipes) as process:
        yield begin
        process.kill()


def finish(job):
    assert set(job.wait()) == {0}, job.log()


def outcome(run):
    """What must be the same: losses, predictions, scores and checks."""
    lines = [json.loads(line) for line in (run / "steps.jsonl").read_text().splitlines()]
    steps = [{k: line.get(k) for k in ("step", "loss", "valid_loss", "lr", "gradient_norm")} for line in lines]
    scores = runs.read_json(run / "scores.json")
    kept = {key: scores.get(key) for key in ("scores", "loss", "checks", "num_steps", "skipped_steps", "rewording")}
    [weights] = [file.read_bytes() for file in (run / "adapter").glob("*.safetensors")]
    return steps, (run / "predictions.jsonl").read_text(), kept, weights


def num_lines(file):
    return file.read_bytes().count(b"\n") if file.exists() else 0


REACHED = {
    "training": lambda run: num_lines(run / "steps.jsonl") >= 3,
    "writing": lambda run: len(list((run / "checkpoint").glob(".step-00000[3-9]"))) > 0,
    "predicting": lambda run: num_lines(run / ".predictions-0.jsonl") >= 2,
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def whole(base, start, tmp_path_factory):
    """The undisturbed run."""
    run = compose(tmp_path_factory.mktemp("whole") / "run", base)
    finish(start(run))
    assert not (run / "checkpoint").exists()
    assert not list(run.glob(".pred*"))
    assert runs.read_json(run / "scores.json")["resumed"] == []
    return outcome(run)


@pytest.mark.parametrize("phase", [pytest.param("training", marks=pytest.mark.faults), "writing", "predicting"])
def test_a_killed_job_ends_as_if_it_had_not_been(phase, whole, base, start, tmp_path):
    run = compose(tmp_path / "run", base)
    job = start(run, slow=0.05)
    job.wait_for(REACHED[phase])
    job.send(signal.SIGKILL)
    assert job.wait() == [-signal.SIGKILL]
    assert not (run / "scores.json").exists()
    finish(start(run))
    assert outcome(run) == whole
    [step] = runs.read_json(run / "scores.json")["resumed"]
    assert step == 8 if phase == "predicting" else 2 <= step < 8
    if phase == "predicting":
        assert job.log().count("answered 4 of 12 rows") == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1], ids=lambda number: number.name)
def test_a_request_to_end_leaves_a_checkpoint_and_status_75(number, whole, base, start, tmp_path):
    run = compose(tmp_path / "run", base, "launch.checkpoint_minutes=60")
    job = start(run, slow=0.05)
    job.wait_for(REACHED["training"])
    job.send(number)
    assert job.wait() == [75]
    assert not (run / "failure.json").exists()
    [path] = checkpoint.found(run / "checkpoint")
    assert checkpoint.step(path) == num_lines(run / "steps.jsonl")
    if number == signal.SIGTERM:
        finish(start(run))
        assert outcome(run) == whole


@pytest.mark.faults
def test_a_request_while_answering_keeps_the_batch(whole, base, start, tmp_path):
    run = compose(tmp_path / "run", base)
    job = start(run, slow=0.05)
    job.wait_for(REACHED["predicting"])
    job.send(signal.SIGTERM)
    assert job.wait() == [75]
    finish(start(run))
    assert outcome(run) == whole
    assert job.log().count("answered 8 of 12 rows") == 1


def test_a_second_interrupt_ends_at_once(base, start, tmp_path):
    job = start(compose(tmp_path / "run", base), slow=60)
    job.wait_for(lambda run: "in the first step" in job.log())
    job.send(signal.SIGINT)
    job.wait_for(lambda run: "asked to end by SIGINT" in job.log())
    assert all(map(psutil.pid_exists, job.pids))
    job.send(signal.SIGINT)
    assert job.wait() == [-signal.SIGINT]


def test_a_request_while_loading_waits_for_nothing(base, start, tmp_path):
    run = compose(tmp_path / "run", base)
    job = start(run)
    job.wait_for(lambda run: "base qwen from" in job.log())
    job.send(signal.SIGTERM)
    assert job.wait() == [75]
    assert not (run / "failure.json").exists()


def test_two_ranks_go_on_together(base, start, tmp_path):
    words = ("launch.num_processes=2", "optim.max_steps=4")
    straight = compose(tmp_path / "straight", base, *words)
    finish(start(straight, ranks=2))
    run = compose(tmp_path / "run", base, *words)
    job = start(run, ranks=2, slow=0.05)
    job.wait_for(REACHED["training"])
    os.kill(job.pids[1], signal.SIGTERM)  # one is enough: they agree
    assert job.wait() == [75, 75], job.log()
    [*_, path] = checkpoint.found(run / "checkpoint")
    assert len(checkpoint.read(path)["random"]) == 2
    finish(start(run, ranks=2))
    assert outcome(run) == outcome(straight)
    assert runs.read_json(run / "scores.json")["resumed"] == [checkpoint.step(path)]


def test_other_inputs_than_it_began_with_are_refused(base, start, tmp_path):
    own, data = tmp_path / "base", tmp_path / "rows.jsonl"
    shutil.copytree(base, own)
    rows = [{"prompt": f"question {n}", "target": f"answer {n}"} for n in range(20)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    data.write_text(text)
    words = ("task=jsonl", f"task.source.path={data}", "task.train_rows=14", "task.valid_rows=2")
    run = compose(tmp_path / "run", own, *words)
    job = start(run, slow=0.05)
    job.wait_for(REACHED["training"])
    job.send(signal.SIGKILL)
    job.wait()
    before = (run / "environment.json").read_bytes()
    data.write_text(text.replace("answer 3", "answer x"))
    refused(start(run), rf"the data \({re.escape(str(data))}\) changed")
    data.write_text(text)
    weights = load_file(own / "model.safetensors")
    weights["model.norm.weight"] *= 1.5
    save_file(weights, own / "model.safetensors", metadata={"format": "pt"})
    refused(start(run), r"the weights \(.*base\) changed")
    assert (run / "environment.json").read_bytes() == before
    assert checkpoint.found(run / "checkpoint")


def refused(job, reason):
    assert job.wait() == [1]
    message = runs.read_json(job.run / "failure.json")["message"]
    assert re.match(reason, message)
    assert "put back what it began with, or remove" in message
    (job.run / "failure.json").unlink()


@pytest.mark.parametrize(("known", "found"), [(4, 2), (6, 1), (None, 0)], ids=["four", "six", "endless"])
def test_rows_longer_than_the_positions_of_the_base_are_counted(known, found):
    config = SimpleNamespace(**({"max_position_embeddings": known} if known else {}))
    base = SimpleNamespace(model=SimpleNamespace(config=config))
    examples = [SimpleNamespace(ids=[0] * length) for length in (3, 4, 5, 7)]
    assert beyond_positions(base, examples) == found


def test_memory_that_runs_out_while_answering_halves_the_batch(whole, base, start, tmp_path):
    run = compose(tmp_path / "run", base)
    finish(start(run, room=1))
    assert outcome(run) == whole
    assert runs.read_json(run / "scores.json")["cost"]["prediction_batch_halvings"] == 2


def steps_of(run):
    return [json.loads(line) for line in (run / "steps.jsonl").read_text().splitlines()]


def test_a_budget_of_tokens_is_the_same_after_a_kill(base, start, tmp_path):
    run = compose(tmp_path / "run", base, "optim.batch_tokens=auto", "optim.max_steps=null")
    job = start(run, slow=0.05)
    job.wait_for(REACHED["training"])
    job.send(signal.SIGKILL)
    job.wait()
    record = runs.read_json(run / "environment.json")
    found = record["batch_tokens"]
    # As on a machine with more memory: what was decided stays.
    runs.write_json(run / "environment.json", {**record, "batch_tokens": 2 * found})
    (run / "checkpoint").rename(tmp_path / "removed")
    finish(start(run))
    assert runs.read_json(run / "environment.json")["batch_tokens"] == 2 * found
    assert runs.read_json(run / "scores.json")["cost"]["batch_tokens"] == 2 * found
    tokens = [line["num_tokens"] for line in steps_of(run)]
    assert max(after - before for before, after in itertools.pairwise([0, *tokens])) <= 2 * found


def test_processes_share_a_budget_of_tokens(base, start, tmp_path):
    words = ("optim.batch_tokens=2000", "method.adapter.lora_dropout=0", "optim.max_steps=4")
    both = []
    for ranks in (1, 2):
        run = compose(tmp_path / f"{ranks}", base, f"launch.num_processes={ranks}", *words)
        finish(start(run, ranks=ranks))
        both.append([line["loss"] for line in steps_of(run)])
    assert len(both[0]) > 1
    assert both[1] == pytest.approx(both[0], rel=1e-4)


@pytest.mark.faults
def test_a_row_that_never_fits_fails_the_run_and_says_what_would(base, start, tmp_path):
    run = compose(tmp_path / "run", base)
    assert start(run, narrow=1).wait() == [1]
    found = runs.read_json(run / "failure.json")
    assert found["kind"] == "out of memory"
    assert re.search(r"one row of \d+ tokens does not fit .* method.quantize=nf4", found["message"])


def test_a_wrong_number_of_processes_is_refused(base, tmp_path):
    run = compose(tmp_path / "run", base, "launch.num_processes=2")
    job = [sys.executable, "-m", "finetune.train", str(run)]
    result = subprocess.run(job, capture_output=True, text=True, check=False, cwd=ROOT)
    assert result.returncode == 1
    assert "launch.num_processes=2, but 1" in result.stdout
