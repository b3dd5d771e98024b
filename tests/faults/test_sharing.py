"""Two sweeps on one tree."""

import json
import signal

import psutil
import pytest
from grids import ENDLESS, descendants, failure, folders, processes_in, started, still_running, wait_for, wait_for_file

GRID = ("-m", "method=lora", "seed=1,2,3", "launch.jobs=1")


@pytest.mark.faults
def test_two_commands_share_a_grid(command, tmp_path):
    sweeps = [command(*GRID, start=True) for _ in range(2)]
    errors = [sweep.communicate(timeout=300)[1] for sweep in sweeps]
    assert [sweep.returncode for sweep in sweeps] == [0, 0], errors
    assert all("3 done" in text for text in errors)
    found = folders(tmp_path)
    assert len(found) == 3
    assert [started(folder) for folder in found] == [1, 1, 1]
    assert not list(tmp_path.rglob("*owner*"))


@pytest.mark.faults
def test_a_cell_whose_sweep_dies_is_taken_over(command, tmp_path):
    first = command("method=lora", *ENDLESS[1:], "optim.max_steps=400", start=True)
    wait_for_file(tmp_path, "multirun/*/*/*/*/seed1/steps.jsonl", while_runs=first)
    second = command("method=lora", *ENDLESS[1:], "optim.max_steps=400", start=True)
    wait_for(lambda: len(descendants(second)) >= 1 and len(processes_in(tmp_path)) >= 5)
    below = descendants(first)
    first.kill()
    first.wait()
    assert still_running(below) == []
    errors = second.communicate(timeout=300)[1]
    assert second.returncode == 0, errors
    [folder] = folders(tmp_path)
    assert len((folder / "steps.jsonl").read_text().splitlines()) == 400


@pytest.mark.faults
def test_who_waits_gets_the_cell_when_the_other_is_stopped(command, tmp_path):
    first = command("method=lora", "optim.epochs=1000", "optim.max_steps=400", start=True)
    wait_for_file(tmp_path, "multirun/*/*/*/*/seed1/steps.jsonl", while_runs=first)
    second = command("method=lora", "optim.epochs=1000", "optim.max_steps=400", start=True)
    wait_for(lambda: len(processes_in(tmp_path)) >= 5)
    first.send_signal(signal.SIGTERM)
    assert first.wait(timeout=60) == 75
    errors = second.communicate(timeout=300)[1]
    assert second.returncode == 0, errors
    assert "1 done" in errors


@pytest.mark.faults
def test_a_failure_of_the_other_sweep_is_not_tried_again(command, tmp_path, fault):
    """Both would fail in the same way: the cell is tried once, and both commands say that it failed."""
    words = ("-m", "method=lora", "seed=1,2", "launch.jobs=1")
    places = fault(**{"seed1/.predictions.jsonl": "raise", "seed2/.predictions.jsonl": "raise"})
    sweeps = [command(*words, start=True, **places) for _ in range(2)]
    for sweep in sweeps:
        sweep.communicate(timeout=300)
    assert [sweep.returncode for sweep in sweeps] == [1, 1]
    for folder in folders(tmp_path):
        assert failure(folder)["kind"] == "error"
        assert not list(folder.glob("failure.*.json"))


@pytest.mark.faults
def test_a_sweep_that_sleeps_through_its_claim_loses_the_cell(command, tmp_path):
    """Suspended for two minutes, on another host: here the heir's claim is written by hand, the sweep is real."""
    from finetune import claims

    sweep = command("method=lora", *ENDLESS, start=True)
    wait_for_file(tmp_path, "multirun/*/*/*/*/seed1/steps.jsonl", while_runs=sweep)
    [folder] = folders(tmp_path)
    heir = claims._me() | {"host": "node7", "once": "heir"}
    assert claims._create(claims._chain(folder)[-1].next, heir)
    wait_for(lambda: _idle(sweep))
    before = (folder / "steps.jsonl").stat().st_size
    assert sweep.poll() is None  # it waits for the heir
    claims_file = claims._chain(folder)[-1].path
    assert json.loads(claims_file.read_text())["host"] == "node7"
    assert (folder / "steps.jsonl").stat().st_size == before
    sweep.send_signal(signal.SIGTERM)
    assert sweep.wait(timeout=60) == 75
    assert not (folder / "failure.json").exists()


def _idle(sweep):
    """No job below the workers."""
    return all(not worker.children() for worker in psutil.Process(sweep.pid).children())
