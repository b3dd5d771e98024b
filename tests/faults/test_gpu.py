"""Resuming on a GPU: a job that is killed goes on to the losses of the undisturbed one, to rounding.

`FAULTS_DEVICE=cpu` runs the same on a CPU.
"""

import json
import os
import subprocess
import sys
import time

import pytest
import torch
from grids import ROOT
from test_job import base, compose  # noqa: F401

DEVICE = os.environ.get("FAULTS_DEVICE", "cuda")
NUM_STEPS = 60
pytestmark = [
    pytest.mark.faults,
    pytest.mark.skipif(DEVICE == "cuda" and not torch.cuda.is_available(), reason="needs a GPU"),
]
METHODS = {
    "lora-dropout": ("method=lora", "method.adapter.lora_dropout=0.2"),
    "adalora": ("method=adalora",),
    "delta_lora": ("method=delta_lora",),
    "prefix": ("method=prefix",),
    "neftune": ("method=lora", "optim.neftune_alpha=5"),
    "float16": ("method=lora", "model.precision=float16"),
    "graphs": ("method=lora", "launch.step=graph"),
}
QUIET = ("optim.epochs=100", f"optim.max_steps={NUM_STEPS}", "optim.accumulation=1", "optim.lr=1e-3")


def start(run):
    known = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    with (run / "run.log").open("ab") as log:
        line = [sys.executable, "-m", "finetune.train", str(run)]
        return subprocess.Popen(line, env=known, stdout=log, stderr=subprocess.STDOUT)


def steps(run):
    return [json.loads(line) for line in (run / "steps.jsonl").read_text().splitlines()]


def number(run):
    file = run / "steps.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0


@pytest.mark.parametrize("name", METHODS)
def test_killed_on_a_gpu_it_goes_on(name, base, tmp_path):  # noqa: F811
    words = (*METHODS[name], f"launch.device={DEVICE}", *QUIET)
    whole, run = (compose(tmp_path / part, base, *words) for part in ("whole", "run"))
    assert start(whole).wait(timeout=300) == 0, (whole / "run.log").read_text()
    job = start(run)
    while number(run) < NUM_STEPS // 3:
        assert job.poll() is None, (run / "run.log").read_text()
        time.sleep(0.002)
    job.kill()
    job.wait()
    reached = number(run)
    assert start(run).wait(timeout=300) == 0, (run / "run.log").read_text()
    scores = json.loads((run / "scores.json").read_text())
    assert len(scores["resumed"]) == 1
    assert reached - 2 <= scores["resumed"][0] <= reached  # steps replayed as graphs are told one late
    one, other = steps(whole), steps(run)
    assert [line["lr"] for line in one] == [line["lr"] for line in other]
    assert [line["loss"] for line in other] == pytest.approx([line["loss"] for line in one], rel=1e-2)
    assert other[-1]["loss"] == pytest.approx(one[-1]["loss"], rel=2e-3)
