"""How a machine is shared among the cells that run at once."""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from finetune.cells import Cell
from finetune.launch import end, shares
from finetune.slots import Slot, Worker, process_of
from finetune.sweep import slots

ROOT = Path(__file__).parent.parent

ONE = {"num_processes": 1, "jobs": None, "device": "auto"}


@pytest.fixture(autouse=True)
def machine(monkeypatch):
    """Eight cores, all GPUs visible, memory for everything."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.setattr("finetune.launch.BYTES_A_CELL", 1)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)


@pytest.mark.parametrize(
    ("launch", "miniature", "cells", "threads"),
    [
        (ONE, True, 8, 1),
        (ONE, False, 1, 8),
        (ONE | {"jobs": 3}, False, 3, 2),
        (ONE | {"num_processes": 2}, True, 4, 1),
        (ONE | {"jobs": 1, "num_processes": 2}, True, 1, 4),
    ],
    ids=["miniatures", "real-base", "asked-for", "two-ranks", "one-at-once"],
)
def test_cells_share_the_cores(launch, miniature, cells, threads):
    assert shares(launch, num_gpus=0, miniature=miniature) == [{"OMP_NUM_THREADS": str(threads)}] * cells


@pytest.mark.parametrize(("launch", "threads"), [(ONE, 1), (ONE | {"jobs": 2}, 3)], ids=["shared", "the-person-shares"])
def test_the_persons_threads_count_where_the_person_shares_the_cores(monkeypatch, launch, threads):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    found = shares(launch, num_gpus=0, miniature=True)
    assert {share["OMP_NUM_THREADS"] for share in found} == {str(threads)}


def test_a_job_sees_its_share_and_not_the_persons_threads(monkeypatch, tmp_path):
    monkeypatch.setenv("OMP_NUM_THREADS", "64")
    slot = Slot({"OMP_NUM_THREADS": "3"})
    job = slot.start(tmp_path, {"num_processes": 1}, way="new")
    try:
        found = Path(f"/proc/{job.process.pid}/environ").read_text().split("\0")
        assert "OMP_NUM_THREADS=3" in found
        assert "OMP_NUM_THREADS=64" not in found
    finally:
        end(job)


def test_a_worker_that_cannot_begin_says_why(monkeypatch, tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError('libcudart is broken')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr("finetune.launch._environment", lambda share: {**os.environ})
    slot = Slot({"OMP_NUM_THREADS": "1"})
    try:
        run = tmp_path / "run"
        run.mkdir()
        job = slot.start(run, {"num_processes": 1}, way="fork")
        deadline = time.monotonic() + 60
        while not job.ended():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        said = json.loads((run / "failure.json").read_text())
        assert said["kind"] == "error"
        assert "before the job began" in said["message"]
        assert "libcudart is broken" in said["message"]
    finally:
        slot.close()


def test_a_process_whose_parent_is_gone_already_ends(tmp_path):
    """Between fork and the request to die with the parent the parent may die: nobody would tell the child."""
    code = f"import os; from finetune.launch import die_with_parent; die_with_parent({os.getpid() + 1}); print('alive')"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert found.stdout == ""
    assert found.returncode == 1


def test_memory_bounds_the_number_of_cells(monkeypatch):
    monkeypatch.setattr("finetune.launch.BYTES_A_CELL", 10**15)
    assert len(shares(ONE, num_gpus=0, miniature=True)) == 1


@pytest.mark.parametrize(
    ("launch", "visible", "found"),
    [
        (ONE, None, ["0", "1", "2", "3"]),
        (ONE | {"num_processes": 2}, "3,1,2,0", ["3,1", "2,0"]),
        (ONE | {"jobs": 5}, None, ["0", "1", "2", "3", "0"]),
    ],
    ids=["one-a-gpu", "visible-ones-in-pairs", "more-than-gpus"],
)
def test_cells_share_the_gpus(monkeypatch, launch, visible, found):
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert [share["CUDA_VISIBLE_DEVICES"] for share in shares(launch, num_gpus=4, miniature=True)] == found


AUTO = {"num_processes": 1, "worker": "auto"}


@pytest.mark.parametrize(
    ("launch", "gpu", "several", "deterministic", "found"),
    [
        (AUTO, True, True, False, "stay"),
        (AUTO, True, False, False, "new"),
        (AUTO, True, True, True, "new"),
        (AUTO, False, True, False, "fork"),
        (AUTO | {"worker": "never"}, True, True, False, "new"),
        (AUTO | {"worker": "never"}, False, True, False, "fork"),
        (AUTO | {"worker": "always"}, False, False, False, "stay"),
    ],
    ids=["cells-of-a-gpu", "one-cell", "deterministic", "cpu", "process", "process-on-a-cpu", "worker-on-a-cpu"],
)
def test_how_a_cell_gets_its_process(monkeypatch, launch, gpu, several, deterministic, found):
    monkeypatch.setattr("finetune.slots.has_gpu", lambda: gpu)
    assert process_of(launch, several=several, deterministic=deterministic) == found


@pytest.fixture
def worker(tmp_path):
    """One that takes jobs and never begins them."""
    found = Worker.__new__(Worker)
    found.said = tempfile.TemporaryFile()  # noqa: SIM115
    found.process = subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True)
    found.threads, found.answers, found.way, found.ended = 1, [], None, False
    yield found
    found.close()


def test_a_worker_takes_the_jobs_that_it_can(worker, tmp_path):
    assert not worker.over("new")
    worker.start(tmp_path, way="stay")
    assert worker.over("stay")  # its job has not ended
    worker.answers = [1, 0]
    assert not worker.over("stay")
    assert worker.over("new")
    worker.close()
    assert worker.over("stay")


@pytest.mark.parametrize(
    ("num_gpus", "jobs", "kept"), [(1, None, True), (2, None, False), (0, 1, False)], ids=["one", "two", "none"]
)
def test_the_first_worker_serves_the_share_that_it_sees(monkeypatch, worker, num_gpus, jobs, kept):
    made = []
    monkeypatch.setattr("finetune.slots.Worker", lambda share: made.append(share) or worker)
    launch = ONE | {"jobs": jobs}
    cell = Cell({"launch": launch, "model": {"path": "somewhere"}, "scale": "tiny"}, Path("a/b/c/d/e"))
    with contextlib.ExitStack() as stack:
        room = slots([cell], num_gpus, stack, first=worker)
        assert len(room) == 1
        assert (made == []) == kept
