"""A checkpoint is whole or passed over, whatever happened to its files."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from finetune import checkpoint

STATE = {
    "weights": {"a": torch.arange(6.0).view(2, 3), "b": torch.tensor(3, dtype=torch.int64)},
    "optimizer": {"state": {0: {"step": torch.tensor(2.0), "exp": torch.ones(3, dtype=torch.bfloat16)}}, "lr": [0.1, (1, None)]},
    "random": (3, tuple(range(5)), None),
    "words": "模型",
    "nothing": {},
}  # fmt: skip


def equal(one, other):
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return list(one) == list(other) and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return type(one) is type(other) and all(map(equal, one, other)) and len(one) == len(other)
    return type(one) is type(other) and one == other


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_what_is_read_is_what_was_written(tmp_path):
    checkpoint.write(tmp_path, STATE, step=7, about={"processes": 1})
    [path] = checkpoint.found(tmp_path)
    assert checkpoint.step(path) == 7
    assert checkpoint.verify(path) == {"processes": 1}
    assert equal(checkpoint.read(path), STATE)
    assert names(path) == ["manifest.json", "state.json", "tensors-000.safetensors"]


def test_tensors_that_share_memory_and_large_ones_are_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "SHARD_BYTES", 40)
    row = torch.arange(4.0)
    state = [row, row, row.view(2, 2).T, row[1:3], row.expand(3, 4)]
    checkpoint.write(tmp_path, state, step=1, about={})
    [path] = checkpoint.found(tmp_path)
    assert equal(checkpoint.read(path), state)
    assert len(names(path)) > 4


def test_the_last_two_are_kept(tmp_path):
    for step in (5, 10, 999_999, 1_000_000):
        checkpoint.write(tmp_path, {"step": step}, step=step, about={})
    assert [checkpoint.step(path) for path in checkpoint.found(tmp_path)] == [999_999, 1_000_000]
    assert names(tmp_path) == ["step-1000000", "step-999999"]


def test_what_json_and_safetensors_cannot_hold_is_refused(tmp_path):
    with pytest.raises(TypeError, match="a set cannot be kept"):
        checkpoint.write(tmp_path, {"state": {1, 2}}, step=1, about={})
    assert names(tmp_path) == []


def cut(file):
    file.write_bytes(file.read_bytes()[:-3])


def empty(file):
    file.write_bytes(b"")


def flip(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)


def lose(file):
    file.unlink()


def replace(file):
    file.write_text("[" * 100_000)


@pytest.mark.parametrize("name", ["manifest.json", "state.json", "tensors-000.safetensors"])
@pytest.mark.parametrize("damage", [cut, empty, flip, lose, replace], ids=lambda damage: damage.__name__)
def test_damage_is_seen(name, damage, tmp_path):
    checkpoint.write(tmp_path, STATE, step=1, about={})
    path = tmp_path / "step-000001"
    checkpoint.verify(path)
    damage(path / name)
    with pytest.raises(ValueError, match=name):
        checkpoint.verify(path)


def test_every_flipped_bit_of_the_manifest_is_seen(tmp_path):
    checkpoint.write(tmp_path, {"a": torch.ones(2)}, step=1, about={"processes": 1})
    file = tmp_path / "step-000001" / "manifest.json"
    content = file.read_bytes()
    for place in range(len(content)):
        if content[place : place + 1].isspace():
            continue
        changed = bytearray(content)
        changed[place] ^= 1
        file.write_bytes(changed)
        with pytest.raises(ValueError, match="manifest"):
            checkpoint.verify(file.parent)


def test_a_checkpoint_of_another_step_is_none_of_this(tmp_path):
    checkpoint.write(tmp_path, STATE, step=1, about={})
    (tmp_path / "step-000001").rename(tmp_path / "step-000002")
    with pytest.raises(ValueError, match="manifest"):
        checkpoint.verify(tmp_path / "step-000002")


def test_a_manifest_reaches_no_file_outside(tmp_path):
    (tmp_path / "secret").write_text("x")
    checkpoint.write(tmp_path / "kept", {}, step=1, about={})
    file = tmp_path / "kept" / "step-000001" / "manifest.json"
    body = json.loads(file.read_text())["body"]
    body["files"] = {"../../secret": [1, "2d711642b726b04401627ca9fbac32f5c8530fb1903cc4db02258717921a4881"]}
    file.write_text(json.dumps({"sha256": checkpoint._digest(body), "body": body}))
    with pytest.raises(ValueError, match="secret is missing"):
        checkpoint.verify(file.parent)


KILLED_AT = """
import os, sys
from pathlib import Path
import torch
from finetune import checkpoint
folder, count = Path(sys.argv[1]), int(sys.argv[2])
def audit(event, args):
    # every change of a file or folder below the checkpoints, and the moment before each
    global count
    if event in ("open", "os.rename", "os.mkdir", "os.rmdir", "os.remove") and str(folder) in str(args[0]):
        if event == "open" and not args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            return
        count -= 1
        if count == 0:
            os.kill(os.getpid(), 9)
sys.addaudithook(audit)
checkpoint.write(folder, {"step": 3, "a": torch.full((9,), 3.0)}, step=3, about={})
"""


def test_killed_at_any_change_of_a_file_the_newest_whole_one_is_there(tmp_path):
    """Forks of one process, so that torch is imported once."""
    runner = f"""
import os, shutil, sys
from pathlib import Path
import torch
from finetune import checkpoint
code, root = {KILLED_AT!r}, Path({str(tmp_path)!r})
for count in range(1, 40):
    folder = root / str(count)
    for step in (1, 2):
        checkpoint.write(folder, {{"step": step, "a": torch.full((9,), float(step))}}, step=step, about={{}})
    pid = os.fork()
    if pid == 0:
        sys.argv = ["", str(folder), str(count)]
        exec(code, {{}})
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    print(count, status)
    if status == 0:
        break
"""
    result = subprocess.run(
        [sys.executable, "-c", runner], capture_output=True, text=True, check=True, cwd=Path(__file__).parent.parent
    )
    ends = [line.split()[1] for line in result.stdout.splitlines()]
    assert ends[-1] == "0"
    assert set(ends[:-1]) == {"-9"}
    assert len(ends) > 5
    for number in range(1, len(ends) + 1):
        folder = tmp_path / str(number)
        checkpoint.sweep(folder)
        newest = checkpoint.found(folder)[-1]
        checkpoint.verify(newest)
        assert equal(checkpoint.read(newest)["a"], torch.full((9,), float(checkpoint.step(newest))))
        assert checkpoint.step(newest) in (2, 3)


@pytest.fixture
def small_disk():
    """`run(code)` runs Python in /mnt, a file system of one megabyte of its own."""
    script = "mount -t tmpfs -o size=1m none /mnt && cd /mnt && exec {} -c {}"

    def run(code):
        import shlex

        words = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
        line = script.format(shlex.quote(sys.executable), shlex.quote(code))
        env = {"PYTHONPATH": str(Path(__file__).parent.parent), "PATH": "/usr/bin:/bin:/usr/sbin:/sbin"}
        result = subprocess.run([*words, line], capture_output=True, text=True, check=False, env=env)
        if result.stderr.startswith("unshare:"):
            pytest.skip("this host gives nobody a file system of their own")
        return result

    return run


def test_a_full_disk_leaves_the_checkpoint_before(small_disk):
    result = small_disk(
        """
from pathlib import Path
import torch
from finetune import checkpoint
folder = Path("/mnt/checkpoint")
checkpoint.write(folder, {"a": torch.ones(60_000)}, step=1, about={})
checkpoint.write(folder, {"a": torch.ones(60_000)}, step=2, about={})
for size in (250_000, 141_900):
    try:
        checkpoint.write(folder, {"a": torch.ones(size)}, step=3, about={})
    except Exception as error:
        print("no space" if "No space left on device" in str(error) else error)
    print(sorted(path.name for path in folder.iterdir()))
    [checkpoint.verify(path) for path in checkpoint.found(folder)]
"""
    )
    assert result.stdout.splitlines() == ["no space", "['step-000001', 'step-000002']"] * 2, result.stderr
