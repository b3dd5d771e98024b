"""Commands on real processes: `python -m finetune` in an empty folder, on a tiny base that is made here."""

import collections
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from report_runs import write_base

ROOT = Path(__file__).parent.parent
QUICK = (
    "optim.max_steps=3",
    "task.train_rows=12",
    "task.valid_rows=6",
    "wandb.mode=disabled",
    "evaluate.max_new_tokens=4",
)
SMALL = ("evaluate.forgetting_text=null", "evaluate.rewording_rows=0", "task.valid_rows=2")
ENDLESS = ("optim.max_steps=100000", "optim.epochs=100000")


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """A random Qwen2 base as a folder."""
    return write_base(tmp_path_factory.mktemp("base"))


def _from_a_terminal():
    """A shell starts what runs in the background with Ctrl-C ignored; a person's command is not."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.fixture
def command(tmp_path, base):
    """Runs `python -m finetune` in an empty folder on the tiny base; `start=True` gives the process instead."""

    def run(*words, start=False, cwd=tmp_path, **environment):
        line = [sys.executable, "-m", "finetune", *QUICK, f"model.path={base}", "model.linear=[q_proj,v_proj]", *words]
        known = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
        how = {"cwd": cwd, "env": known, "stderr": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        how["preexec_fn"] = _from_a_terminal
        if not start:
            return subprocess.run(line, check=False, timeout=300, **how)
        started.append(subprocess.Popen(line, **how))
        return started[-1]

    started = []
    yield run
    for process in started:
        process.kill()
        process.communicate()


@pytest.fixture
def fault(tmp_path_factory):
    """`fault(**{"seed1/steps.jsonl": "segfault"})`: what becomes of a process that opens such a file; environment."""
    folder = tmp_path_factory.mktemp("fault")
    (folder / "sitecustomize.py").write_text(FAULTY)

    def environment(**places):
        given = places
        return {"PYTHONPATH": f"{folder}{os.pathsep}{ROOT}", "FAULTS": json.dumps(given)}

    return environment


@pytest.fixture
def told(capsys):
    """Counts by kind, printed at the end of a test."""
    counts = collections.Counter()
    yield counts
    with capsys.disabled():
        print("", dict(sorted(counts.items())), end=" ")


# Python runs this first in every process; it acts in whichever opens the file, as a bug or the kernel would.
FAULTY = """
import json, os, signal, sys

def segfault():
    os.kill(os.getpid(), signal.SIGSEGV)

def error():
    raise RuntimeError("a part broke")

def full():
    raise OSError(28, "No space left on device")

def exits():
    sys.exit(3)

def deaf():
    signal.signal(signal.SIGTERM, signal.SIG_IGN)

def kill():
    import subprocess
    subprocess.Popen(["sleep", "1000"])  # in the session of the job: it must not outlive it
    os.kill(os.getpid(), signal.SIGKILL)

def fill():
    size = 2**20
    with open("multirun/filling", "ab", buffering=0) as file:
        while size:
            try:
                os.posix_fallocate(file.fileno(), os.fstat(file.fileno()).st_size, size)
            except OSError:
                size //= 2

def trackers():
    import psutil
    for child in psutil.Process().children(recursive=True):
        child.kill()

KINDS = {
    "raise": error, "full": full, "sys.exit": exits, "os._exit": lambda: os._exit(7), "segfault": segfault,
    "kill": kill, "deaf": deaf, "fill": fill, "kill trackers": trackers,
}
PLACES = json.loads(os.environ.get("FAULTS", "{}"))

def hook(event, arguments):
    if event == "open" and isinstance(arguments[0], str):
        for place in [place for place in PLACES if place in arguments[0]]:
            KINDS[PLACES.pop(place)]()

sys.addaudithook(hook)
"""


def folders(tmp_path):
    return [path.parent for path in sorted(tmp_path.glob("multirun/*/*/*/*/seed*/config.yaml"))]


def processes_in(folder):
    """The processes that work in a folder, with their command lines."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if (process / "cwd").readlink() == folder:
                found[process] = (process / "cmdline").read_text().replace("\0", " ")
    return found


def descendants(process):
    """All processes that a process started, however deep."""
    return psutil.Process(process.pid).children(recursive=True)


def still_running(processes, *, seconds=5):
    """Those that do not end by then; one that has ended and waits for init to notice it has."""
    end = time.monotonic() + seconds
    while (left := [process for process in processes if alive(process)]) and time.monotonic() < end:
        time.sleep(0.1)
    return left


def alive(process):
    """Does it run? One that has ended and waits for init does not."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def wait_for(condition, *, seconds=120, while_runs=None):
    """Until the condition holds; its value."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, "waited in vain"
        assert while_runs is None or while_runs.poll() is None, while_runs.communicate()
        time.sleep(0.1)
    return found


def wait_for_file(tmp_path, pattern, **how):
    return wait_for(lambda: sorted(tmp_path.glob(pattern)), **how)


def started(folder):
    """How often a job began in the folder."""
    return (folder / "run.log").read_text().count("training rows,")


def failure(folder):
    return json.loads((folder / "failure.json").read_text())
