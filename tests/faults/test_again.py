"""The same command again, after the sweep was stopped and after it was killed: the end is that of the undisturbed sweep."""

import json
import signal

import pytest
from grids import ROOT, SMALL, descendants, failure, folders, processes_in, still_running, wait_for

from finetune import checkpoint

pytestmark = pytest.mark.faults

STEPS = ("optim.epochs=200", "optim.max_steps=40", "optim.validations=2", "launch.checkpoint_minutes=0")
GRID = ("-m", "method=lora", "seed=1,2,3,4", "launch.jobs=1", "method.adapter.lora_dropout=0.1", *STEPS, *SMALL)
SCIENCE = ("step", "loss", "valid_loss", "lr", "gradient_norm")


def cells(tmp_path, study):
    return {folder.name: folder for folder in folders(tmp_path) if folder.parts[-5] == study}


def lines(folder):
    file = folder / "steps.jsonl"
    return file.read_text().splitlines() if file.exists() else []


def outcome(folder):
    """Losses, answers, scores and weights."""
    steps = [{key: json.loads(line).get(key) for key in SCIENCE} for line in lines(folder)]
    scores = json.loads((folder / "scores.json").read_text())["scores"]
    [weights] = [file.read_bytes() for file in (folder / "adapter").glob("*.safetensors")]
    return steps, (folder / "predictions.jsonl").read_text(), scores, weights


def untouched(folder):
    return {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in folder.rglob("*")}


def at_work(tmp_path, seed, sweep):
    """The folder of a cell of the wild sweep that is in the middle of its training."""
    wait_for(lambda: len(lines(cells(tmp_path, "wild").get(seed, tmp_path))) >= 10, while_runs=sweep)
    return cells(tmp_path, "wild")[seed]


def test_stopped_in_one_cell_and_killed_in_the_next(command, tmp_path):
    assert command(*GRID, "study=calm").returncode == 0
    calm = {seed: outcome(folder) for seed, folder in cells(tmp_path, "calm").items()}

    sweep = command(*GRID, "study=wild", start=True)
    second = at_work(tmp_path, "seed2", sweep)
    done = untouched(cells(tmp_path, "wild")["seed1"])
    below = descendants(sweep)
    sweep.send_signal(signal.SIGTERM)
    sweep.communicate(timeout=60)
    assert sweep.returncode == 75
    assert still_running(below) == []
    assert failure(second)["kind"] == "interrupted"
    kept = checkpoint.found(second / "checkpoint")[-1]
    checkpoint.verify(kept)
    assert checkpoint.step(kept) == len(lines(second))
    assert set(cells(tmp_path, "wild")) == {"seed1", "seed2"}  # later cells are not begun

    sweep = command(*GRID, "study=wild", start=True)
    third = at_work(tmp_path, "seed3", sweep)
    below = descendants(sweep)
    sweep.kill()
    sweep.wait()
    assert still_running(below) == []
    reached = len(lines(third))

    result = command(*GRID, "study=wild")
    assert result.returncode == 0, result.stderr
    assert "4 done" in result.stderr
    wild = cells(tmp_path, "wild")
    assert {seed: outcome(folder) for seed, folder in wild.items()} == calm
    resumed = {seed: json.loads((folder / "scores.json").read_text())["resumed"] for seed, folder in wild.items()}
    assert resumed["seed1"] == resumed["seed4"] == []
    assert resumed["seed2"] == [checkpoint.step(kept)]
    assert resumed["seed3"][0] in (reached - 1, reached)  # one checkpoint interval, which is a step here
    assert untouched(wild["seed1"]) == done
    assert processes_in(tmp_path) == {}

    before = {folder: untouched(folder) for folder in wild.values()}
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "torch.py").write_text("raise SystemExit('torch was imported')\n")
    again = command(*GRID, "study=wild", PYTHONPATH=f"{tmp_path / 'broken'}:{ROOT}")
    assert again.returncode == 0, again.stderr
    assert {folder: untouched(folder) for folder in wild.values()} == before
