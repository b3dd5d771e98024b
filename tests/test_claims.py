"""A folder has one owner at a time, whoever dies when."""

import json
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from finetune import claims

ROOT = Path(__file__).parent.parent
HOLD = "import sys, time; from pathlib import Path; from finetune import claims; claims.take(Path(sys.argv[1]));"


@pytest.fixture
def elsewhere():
    """Starts a process that takes a folder, and then runs the words given; killed at the end."""

    def start(run, words="print('taken', flush=True); time.sleep(60)"):
        line = [sys.executable, "-c", HOLD + words, str(run)]
        process = subprocess.Popen(line, stdout=subprocess.PIPE, text=True, cwd=ROOT)
        started.append(process)
        assert process.stdout.readline() == "taken\n"
        return process

    started = []
    yield start
    for process in started:
        process.kill()
        process.wait()


def age(run, seconds):
    """Make the owner's last heartbeat so old."""
    path = claims._chain(run)[-1].path
    now = time.time()
    os.utime(path, (now - seconds, now - seconds))


def of_another_host(run, **changed):
    me = claims._me()
    (run / "owner.json").write_text(json.dumps(me | {"host": "node7", "pid": 1} | changed))


def files(run):
    return sorted(path.name for path in run.iterdir())


def test_a_claim_has_one_owner_and_leaves_nothing(tmp_path):
    claims.take(tmp_path)
    assert claims.lives(tmp_path)
    assert json.loads((tmp_path / "owner.json").read_text())["pid"] == os.getpid()
    with pytest.raises(claims.Taken, match=f"process {os.getpid()} on {socket.gethostname()}"):
        claims.take(tmp_path)
    assert claims.beat(tmp_path)
    claims.release(tmp_path)
    assert files(tmp_path) == []
    assert not claims.beat(tmp_path)


def test_another_process_is_respected_while_it_lives(tmp_path, elsewhere):
    owner = elsewhere(tmp_path)
    age(tmp_path, 10_000)  # stopped, but there: its process says so, not its heartbeat
    with pytest.raises(claims.Taken):
        claims.take(tmp_path)
    claims.release(tmp_path)  # not ours
    assert claims.lives(tmp_path)
    owner.kill()
    owner.wait()
    assert not claims.lives(tmp_path)
    claims.take(tmp_path)
    assert claims.beat(tmp_path)
    claims.release(tmp_path)
    assert files(tmp_path) == []


def test_a_process_id_that_was_given_again_is_not_the_owner(tmp_path):
    me = claims._me()
    (tmp_path / "owner.json").write_text(json.dumps(me | {"start": me["start"] - 100}))
    claims.take(tmp_path)
    assert claims.beat(tmp_path)


def test_a_zombie_is_dead(tmp_path, elsewhere):
    owner = elsewhere(tmp_path)
    owner.kill()
    os.waitid(os.P_PID, owner.pid, os.WEXITED | os.WNOWAIT)
    assert claims.process_start(owner.pid) is None
    assert not claims.lives(tmp_path)


def test_a_record_without_a_start_is_judged_by_its_process(tmp_path):
    (tmp_path / "owner.json").write_text(json.dumps({"host": socket.gethostname(), "pid": os.getpid()}))
    with pytest.raises(claims.Taken):
        claims.take(tmp_path)
    gone = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    (tmp_path / "owner.json").write_text(json.dumps({"host": socket.gethostname(), "pid": int(gone.stdout)}))
    claims.take(tmp_path)


@pytest.mark.parametrize("changed", [{"host": "node7"}, {"machine": "another boot"}], ids=["host", "boot"])
def test_an_owner_elsewhere_is_dead_when_its_heart_stands_still(tmp_path, monkeypatch, changed):
    monkeypatch.setattr(claims, "CONFIRM_SECONDS", 0.2)
    of_another_host(tmp_path, host=socket.gethostname(), **changed) if "machine" in changed else of_another_host(
        tmp_path
    )
    seen = {}
    with pytest.raises(claims.Taken):
        claims.take(tmp_path, seen=seen)
    age(tmp_path, claims.STALE_SECONDS + 1)
    with pytest.raises(claims.Taken):  # old by the clock, but not yet seen to stand still
        claims.take(tmp_path, seen=seen)
    time.sleep(0.25)
    claims.take(tmp_path, seen=seen)
    assert claims.beat(tmp_path)
    claims.release(tmp_path)
    assert files(tmp_path) == []


def test_a_clock_that_jumps_ahead_kills_no_owner(tmp_path, monkeypatch):
    monkeypatch.setattr(claims, "CONFIRM_SECONDS", 0.2)
    of_another_host(tmp_path)
    seen = {}
    for jump in (0, 10_000, 10_001, 9_000):  # it beats, by whatever clock
        age(tmp_path, jump)
        with pytest.raises(claims.Taken):
            claims.take(tmp_path, seen=seen)
        time.sleep(0.15)


def test_a_heartbeat_from_the_future_does_not_last(tmp_path, monkeypatch):
    monkeypatch.setattr(claims, "STALE_SECONDS", 0.3)
    of_another_host(tmp_path)
    age(tmp_path, -10_000)
    seen = {}
    with pytest.raises(claims.Taken):
        claims.take(tmp_path, seen=seen)
    time.sleep(0.35)
    claims.take(tmp_path, seen=seen)


def test_who_was_taken_over_notices_and_gives_nothing_back(tmp_path, elsewhere):
    me = claims._me()
    (tmp_path / "owner.json").write_text(json.dumps(me))
    assert claims.beat(tmp_path)
    claims._create(claims._chain(tmp_path)[-1].next, me | {"host": "node7", "once": "other"})
    assert not claims.beat(tmp_path)
    claims.release(tmp_path)
    assert claims.lives(tmp_path)
    assert len(files(tmp_path)) == 2


def test_whoever_follows_a_claim_that_was_given_back_gets_nothing(tmp_path):
    """Between reading the chain and going on from it the owner ends: the new claim must not count."""
    claims.take(tmp_path)
    last = claims._chain(tmp_path)[-1]
    claims.release(tmp_path)
    assert claims._create(last.next, claims._me())
    assert not claims._mine(tmp_path)
    claims.take(tmp_path)


@pytest.mark.parametrize(
    "content", ["", "[]", "{", "null", "[" * 100_000], ids=["empty", "list", "cut", "null", "deep"]
)
def test_what_cannot_be_read_is_believed_until_it_is_old(tmp_path, monkeypatch, content):
    monkeypatch.setattr(claims, "CONFIRM_SECONDS", 0.0)
    (tmp_path / "owner.json").write_text(content)
    assert claims.lives(tmp_path)
    age(tmp_path, claims.STALE_SECONDS + 1)
    assert not claims.lives(tmp_path)
    claims.take(tmp_path, seen={})
    assert claims.beat(tmp_path)


RACE = """
import sys, time
from pathlib import Path
from finetune import claims
run, start = Path(sys.argv[1]), float(sys.argv[2])
time.sleep(max(0.0, start - time.time()))
for _ in range(40):
    try:
        claims.take(run)
    except claims.Taken:
        continue
    inside = run / "inside"
    inside.mkdir()  # fails where another is inside
    (run / "count").open("a").write("x")
    inside.rmdir()
    if len(sys.argv) > 3:
        sys.exit()  # dies without giving back
    claims.release(run)
"""


@pytest.mark.parametrize("dies", [[], ["dies"]], ids=["given-back", "taken-over"])
def test_of_many_one_is_inside(tmp_path, dies):
    start = str(time.time() + 1)
    line = [sys.executable, "-c", RACE, str(tmp_path), start, *dies]
    racing = [subprocess.Popen(line, cwd=ROOT, stderr=subprocess.PIPE, text=True) for _ in range(6)]
    errors = [process.communicate(timeout=60)[1] for process in racing]
    assert errors == [""] * 6
    assert len((tmp_path / "count").read_text()) >= 1
    assert not claims.lives(tmp_path)


def test_a_dead_owner_has_one_heir(tmp_path):
    """All take over the same dead claim at the same moment: each claim that succeeds is of a process that died."""
    (tmp_path / "owner.json").write_text(json.dumps(claims._me() | {"start": 0}))
    won, barrier = [], threading.Barrier(8)

    def take():
        barrier.wait()
        try:
            claims.take(tmp_path)
        except claims.Taken:
            return
        won.append(1)

    threads = [threading.Thread(target=take) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert won == [1]


def test_a_file_system_without_hard_links(tmp_path, monkeypatch):
    def link(*_):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", link)
    claims.take(tmp_path)
    with pytest.raises(claims.Taken):
        claims.take(tmp_path)
    claims.release(tmp_path)
    assert files(tmp_path) == []
