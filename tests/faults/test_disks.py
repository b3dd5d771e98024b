"""Disks that are full or may not be written: real ones, mounted here."""

import json
import os
import subprocess

import pytest
from grids import ENDLESS, SMALL, failure, folders, wait_for_file

pytestmark = pytest.mark.faults


def mounted(folder, *options):
    folder.mkdir(exist_ok=True)
    done = subprocess.run(["mount", *options, str(folder)], capture_output=True, text=True)
    if done.returncode:
        pytest.skip("needs the right to mount a file system")


@pytest.fixture
def disk(tmp_path):
    """A disk of so many bytes in `tmp_path/multirun`."""

    def mount(size):
        mounted(tmp_path / "multirun", "-t", "tmpfs", "-o", f"size={size}", "none")
        mounts.append(tmp_path / "multirun")
        return tmp_path / "multirun"

    mounts = []
    yield mount
    for folder in mounts:
        subprocess.run(["umount", str(folder)], check=True)


def fill(folder, *, leave):
    """Use up all of the disk but so many bytes."""
    free = os.statvfs(folder)
    with (folder / "filling").open("wb") as file:
        file.truncate(0)
        os.posix_fallocate(file.fileno(), 0, free.f_bavail * free.f_frsize - leave)


@pytest.mark.parametrize("leave", [4096, 40960], ids=["at-the-claim", "at-the-checkpoint"])
def test_a_full_disk_fails_its_cell_and_loses_nothing(command, tmp_path, disk, leave):
    root = disk("8m")
    assert command("method=lora", "seed=1").returncode == 0
    [done] = folders(tmp_path)
    before = {path.name: path.read_bytes() for path in done.iterdir() if path.is_file()}
    fill(root, leave=leave)
    result = command("-m", "method=lora", "seed=1,2")
    assert result.returncode == 1
    assert "No space left" in result.stderr or "no space" in result.stderr
    assert "Traceback" not in result.stderr
    assert {path.name: path.read_bytes() for path in done.iterdir() if path.is_file()} == before
    (root / "filling").unlink()
    again = command("-m", "method=lora", "seed=1,2")
    assert again.returncode == 0, again.stderr
    assert "2 done" in again.stderr


PLACES = {
    "steps": "steps.jsonl",
    "checkpoint": "checkpoint/.step-",
    "adapter": ".adapter/",
    "answers": ".predictions-0.jsonl",
    "predictions": ".predictions.jsonl.",
    "scores": ".scores.json.",
}


def test_a_disk_that_is_full_when_a_file_is_written(command, tmp_path, disk, fault):
    """Each file in a cell of its own, and the next command goes on with the cell before."""
    root = disk("8m")
    words = ("-m", "method=lora", *SMALL)
    before = {}
    for seed, (name, place) in enumerate(PLACES.items(), start=1):
        seeds = f"seed={','.join(map(str, range(seed + 1)))}"
        result = command(*words, seeds, **fault(**{f"seed{seed}/{place}": "fill"}))
        assert result.returncode == 1, name
        assert f"{seed} done, 1 failed" in result.stderr, name
        assert "no space" in result.stderr.lower(), name
        assert "Traceback" not in result.stderr, name
        assert all(path.read_bytes() == content for path, content in before.items()), name
        (root / "filling").unlink()
        before = {path: path.read_bytes() for path in root.glob("*/*/*/*/*/scores.json")}
    again = command(*words, f"seed={','.join(map(str, range(1 + len(PLACES))))}")
    assert again.returncode == 0, again.stderr
    assert f"{1 + len(PLACES)} done" in again.stderr
    [*_, answered, last] = [json.loads((folder / "scores.json").read_text())["resumed"] for folder in folders(tmp_path)]
    assert answered == last == [3]  # what was trained is not trained again


def test_a_tree_that_may_not_be_written_is_told_and_read(command, tmp_path, disk):
    root = disk("8m")
    assert command("method=lora", "seed=1").returncode == 0
    subprocess.run(["mount", "-o", "remount,ro", str(root)], check=True)
    result = command("-m", "method=lora", "seed=1,2")
    assert result.returncode == 1
    assert "Read-only file system" in result.stderr
    assert "Traceback" not in result.stderr
    assert command("method=lora", "seed=1").returncode == 0
    subprocess.run(["mount", "-o", "remount,rw", str(root)], check=True)
    assert command("-m", "method=lora", "seed=1,2").returncode == 0


def test_a_disk_that_fills_up_during_a_run(command, tmp_path, disk):
    root = disk("8m")
    sweep = command("method=lora", *ENDLESS, start=True)
    wait_for_file(tmp_path, "multirun/*/*/*/*/seed1/steps.jsonl", while_runs=sweep)
    fill(root, leave=0)
    errors = sweep.communicate(timeout=120)[1]
    assert sweep.returncode == 1
    assert "Traceback" not in errors
    for record in root.rglob("failure.json"):
        json.loads(record.read_text())
    assert failure_or_message(root, errors)


def failure_or_message(root, errors):
    found = list(root.rglob("failure.json"))
    return failure(found[0].parent)["kind"] == "no space" if found else "no space" in errors.lower()
