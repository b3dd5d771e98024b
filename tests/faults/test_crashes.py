"""Cells that die, each in its own way, among cells that do not."""

import json
import re
import signal
import subprocess
import sys

import pytest
from grids import ROOT, SMALL, alive, descendants, failure, folders, processes_in, started, wait_for, wait_for_file
from report_runs import write_base

from finetune.ranks import cause

KINDS = {
    1: ("raise", "error", "a part broke"),
    2: ("sys.exit", "error", "exit status 3"),
    3: ("os._exit", "error", "exit status 7"),
    4: ("segfault", "signal", "signal 11 (SIGSEGV)"),
    5: ("kill", "killed", "out of memory?"),
    6: ("full", "no space", "no space left"),
}


@pytest.mark.parametrize("launch", ["process", pytest.param("worker", marks=pytest.mark.faults)])
def test_however_cells_die_the_others_finish(command, tmp_path, fault, launch):
    """In two commands at once: each cell is tried once, by one of them, and both tell of all."""
    places = fault(**{f"seed{seed}/steps.jsonl": kind for seed, (kind, _, _) in KINDS.items()})
    seeds = f"seed={','.join(map(str, [*KINDS, 7]))}"
    words = ("-m", "method=lora", seeds, f"launch={launch}", "launch.jobs=1", *SMALL)
    sweeps = [command(*words, start=True, **places) for _ in range(2)]
    said = [sweep.communicate(timeout=300)[1] for sweep in sweeps]
    assert [sweep.returncode for sweep in sweeps] == [1, 1]
    found = {int(folder.name.removeprefix("seed")): folder for folder in folders(tmp_path)}
    for seed, (_, kind, message) in KINDS.items():
        assert failure(found[seed])["kind"] == kind
        assert message in failure(found[seed])["message"]
        assert not (found[seed] / "scores.json").exists()
        for errors in said:
            [line] = [line for line in errors.splitlines() if f"seed{seed}:" in line]
            assert message in line
            assert str(found[seed].relative_to(tmp_path) / "run.log") in line
    assert all("1 done, 6 failed" in errors and "Traceback" not in errors for errors in said)
    assert (found[7] / "scores.json").exists()
    assert [started(folder) for folder in found.values()] == [1] * 7
    assert not list(tmp_path.rglob("failure.*.json"))
    assert processes_in(tmp_path) == {}
    assert not list(tmp_path.rglob("*owner*"))
    line = [sys.executable, "-m", "finetune.report", "multirun"]
    report = subprocess.run(
        line, cwd=tmp_path, env={"PYTHONPATH": str(ROOT), "PATH": ""}, capture_output=True, text=True
    )
    assert report.returncode == 0, report.stderr
    page = (tmp_path / "multirun" / "main" / "report.md").read_text()
    assert all(message in page for _, _, message in KINDS.values() if "?" not in message)
    assert page.count("failed") >= 6


@pytest.mark.faults
def test_one_dead_rank_ends_the_cell(command, tmp_path, fault):
    """The other rank waits for it in a collective operation, for ever if nobody ends it."""
    places = fault(**{"seed1/steps.jsonl": "segfault"})
    sweep = command("method=lora", "launch.num_processes=2", start=True, **places)
    wait_for_file(tmp_path, "multirun/*/*/*/*/seed1/environment.json", while_runs=sweep)
    ranks = [process for process in descendants(sweep) if "finetune.ranks" in process.cmdline()]
    assert len(ranks) == 3  # the launcher and both
    wait_for(lambda: any(not alive(process) for process in ranks))
    wait_for(lambda: sweep.poll() is not None, seconds=60)
    assert sweep.returncode == 1
    [folder] = folders(tmp_path)
    assert failure(folder)["kind"] == "signal"
    assert "11" in failure(folder)["message"]


@pytest.mark.parametrize(
    ("failures", "status"),
    [
        ([(100, 1), (100, -signal.SIGSEGV)], -signal.SIGSEGV),
        ([(100, -signal.SIGKILL), (101, 1)], -signal.SIGKILL),
        ([(100, 1), (100, -signal.SIGTERM)], 1),
        ([(100, 1), (133, -signal.SIGKILL)], 1),
        ([(101, -signal.SIGABRT), (100, 3)], 3),
        ([(100, -signal.SIGABRT)], -signal.SIGABRT),
    ],
    ids=["died", "killed", "ended-by-torch", "killed-by-torch", "aborted-by-nccl", "aborted-alone"],
)
def test_the_rank_that_the_others_fell_with_is_the_cause(failures, status):
    assert cause(failures) == status


@pytest.mark.faults
def test_a_rank_that_fails_says_why(command, tmp_path, fault):
    places = fault(**{"seed1/steps.jsonl": "raise"})
    assert command("method=lora", "launch.num_processes=2", **places).returncode == 1
    [folder] = folders(tmp_path)
    assert (failure(folder)["kind"], failure(folder)["message"]) == ("error", "a part broke")


@pytest.mark.faults
def test_weights_that_are_no_numbers_are_told_and_never_trained(command, tmp_path):
    from safetensors.torch import load_file, save_file

    base = write_base(tmp_path / "base")
    weights = load_file(base / "model.safetensors")
    weights["model.layers.0.mlp.down_proj.weight"][0, 0] = float("nan")
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    result = command("method=lora", f"model.path={base}", "study=broken")
    assert result.returncode == 1
    [folder] = folders(tmp_path)
    assert failure(folder)["kind"] == "not-a-number"
    assert re.search(r"step 3: loss .*nan.* learning rate .*, rows ", failure(folder)["message"])
    assert not (folder / "scores.json").exists()
    steps = folder / "steps.jsonl"
    losses = [json.loads(line)["loss"] for line in steps.read_text().splitlines()] if steps.exists() else []
    assert all(loss is None for loss in losses)
