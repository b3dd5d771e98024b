"""Cells that follow one another in one process give what cells in processes of their own give."""

import json

import psutil
from grids import ENDLESS, failure, folders, processes_in, still_running, wait_for_file

from finetune import runs

METHODS = ("none", "lora", "full", "prefix", "llama_adapter", "bitfit", "qlora", "ptuning")  # two move the base


def outcome(folder):
    """What a cell says, time and memory left out."""
    scores = json.loads((folder / "scores.json").read_text())
    steps = folder / "steps.jsonl"
    losses = [json.loads(line)["loss"] for line in steps.read_text().splitlines()] if steps.exists() else []
    return scores["scores"], scores["loss"], scores["checks"], losses, (folder / "predictions.jsonl").read_text()


def test_cells_of_one_process_give_what_separate_processes_give(command, tmp_path):
    found = {}
    for launch in ("process", "worker"):
        where = tmp_path / launch
        where.mkdir()
        words = ("-m", f"method={','.join(METHODS)}", f"launch={launch}", "launch.jobs=1")
        result = command(*words, cwd=where)
        assert result.returncode == 0, result.stderr
        found[launch] = {folder.parent.name: outcome(folder) for folder in folders(where)}
    assert len(found["worker"]) == len(METHODS)
    for name, expected in found["process"].items():
        assert found["worker"][name] == expected, name


def test_a_worker_is_one_process_until_a_cell_fails(command, tmp_path, fault):
    places = fault(**{"seed2/steps.jsonl": "raise"})
    result = command("-m", "method=lora", "seed=1,2,3,4", "launch=worker", "launch.jobs=1", **places)
    assert result.returncode == 1
    one, two, three, four = folders(tmp_path)
    assert failure(two)["message"] == "a part broke"
    assert not (two / "scores.json").exists()
    logs = [(folder / "run.log").read_text() for folder in (one, two, three, four)]
    assert ["loaded" in log for log in logs] == [True, False, True, False]  # the base, by each process once
    assert all((folder / "scores.json").exists() for folder in (one, three, four))
    assert [runs.read_config(folder)["launch"]["alike"] for folder in (one, two, three, four)] == [4] * 4


def test_a_worker_stops_politely_and_its_cell_goes_on(command, tmp_path):
    words = ("-m", "method=lora", "seed=1,2", "launch=worker", "launch.jobs=1", "launch.checkpoint_minutes=0")
    sweep = command(*words, *ENDLESS, start=True)
    wait_for_file(tmp_path, "multirun/*/*/*/*/seed1/checkpoint/*/manifest*", while_runs=sweep)
    below = psutil.Process(sweep.pid).children(recursive=True)
    sweep.terminate()
    sweep.communicate(timeout=60)
    assert sweep.returncode == 75
    assert still_running(below) == []
    assert processes_in(tmp_path) == {}
    [folder] = folders(tmp_path)
    assert failure(folder)["kind"] == "interrupted"
    assert list(folder.glob("checkpoint/*"))
