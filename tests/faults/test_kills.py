"""SIGKILL at 25 random moments, five in each phase of a job: the end is that of the undisturbed run."""

import random
import signal
import time

import pytest
from test_job import base, compose, finish, num_lines, outcome, start  # noqa: F401

pytestmark = pytest.mark.faults

METHODS = {
    "lora-dropout": ("method=lora", "method.adapter.lora_dropout=0.2"),
    "adalora": ("method=adalora", "method.adapter.lora_dropout=0.1"),
    "delta_lora": ("method=delta_lora",),
    "prefix": ("method=prefix",),
    "neftune": ("method=lora", "optim.neftune_alpha=5"),
}
# When a job has come to a phase, for a random whole number below five.
PHASES = {
    "loading": lambda run, n: (run / "run.log").exists(),
    "training": lambda run, n: num_lines(run / "steps.jsonl") > n,
    "writing": lambda run, n: (
        len(list((run / "checkpoint").glob(f"*step-00000{n + 2}"))) > 0
    ),  # the draft, or what it became
    "predicting": lambda run, n: num_lines(run / ".predictions-0.jsonl") > n % 3,
    "scoring": lambda run, n: (run / "predictions.jsonl").exists(),
}
LASTING = {"loading": 0.5, "training": 0.1, "writing": 0.01, "predicting": 0.1, "scoring": 0.3}  # seconds


@pytest.fixture(scope="module")
def undisturbed(base, start, tmp_path_factory):  # noqa: F811
    """method -> the outcome of a run that nothing disturbs."""
    found = {}

    def of(name):
        if name not in found:
            run = compose(tmp_path_factory.mktemp(name) / "run", base, *METHODS[name])
            finish(start(run))
            found[name] = outcome(run)
        return found[name]

    return of


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("phase", PHASES)
def test_killed_at_random_it_ends_as_if_it_had_not_been(phase, name, undisturbed, base, start, tmp_path):  # noqa: F811
    whole = undisturbed(name)
    draw = random.Random(f"{phase} {name}")
    run = compose(tmp_path / "run", base, *METHODS[name])
    job = start(run, slow=0.1)
    number = draw.randrange(5)
    job.wait_for(lambda run: PHASES[phase](run, number))
    time.sleep(draw.random() * LASTING[phase])
    job.send(signal.SIGKILL)
    assert job.wait() == [-signal.SIGKILL]
    assert not (run / "scores.json").exists()
    finish(start(run))
    assert outcome(run) == whole
