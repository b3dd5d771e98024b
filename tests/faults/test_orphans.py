"""Nothing is left running, whoever dies and how: also with two ranks, also with W&B's own process."""

import signal

import psutil
import pytest
from grids import ENDLESS, descendants, processes_in, still_running, wait_for, wait_for_file

pytestmark = pytest.mark.faults

RANKS = ("launch.num_processes=2",)
TRACKED = ("wandb.mode=offline",)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL], ids=lambda number: number.name)
@pytest.mark.parametrize("words", [RANKS, TRACKED, RANKS + TRACKED], ids=["two-ranks", "wandb", "both"])
def test_no_orphans(command, tmp_path, words, number):
    sweep = command("method=lora", *words, *ENDLESS, start=True)
    wait_for_file(tmp_path, "multirun/*/*/*/*/seed1/steps.jsonl", while_runs=sweep)
    below = descendants(sweep)
    assert len(below) >= (4 if words[0] == RANKS[0] else 3)
    sweep.send_signal(number)
    sweep.communicate(timeout=60)
    assert still_running(below) == []
    assert processes_in(tmp_path) == {}


@pytest.mark.parametrize("moment", [0.1, 0.5, 1.0, 2.0, 3.0, 4.5, 6.0, 8.0])
@pytest.mark.parametrize("words", [(), RANKS], ids=["worker", "two-ranks"])
def test_a_kill_at_any_moment_of_the_start(command, tmp_path, words, moment):
    """Processes that are being started have not yet asked to die with their parent."""
    import time

    sweep = command("-m", "method=lora", "seed=1,2", *words, *ENDLESS, start=True)
    time.sleep(moment)
    sweep.kill()
    sweep.wait()
    wait_for(lambda: processes_in(tmp_path) == {}, seconds=5)


def test_a_killed_job_takes_its_tracker_along(command, tmp_path):
    sweep = command("method=lora", *TRACKED, *ENDLESS, start=True)
    wait_for_file(tmp_path, "multirun/*/*/*/*/seed1/steps.jsonl", while_runs=sweep)
    [worker] = [child for child in psutil.Process(sweep.pid).children() if child.children()]
    [job] = worker.children()
    below = job.children(recursive=True)
    assert below
    job.kill()
    sweep.communicate(timeout=60)
    assert sweep.returncode == 1
    assert still_running(below) == []
