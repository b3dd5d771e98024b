"""What lies in folders, damaged: configurations, records, checkpoints, answers. Each is read, or refused.

Damaged are the bytes of every file, and the values that YAML and JSON hold. `FUZZ_EXAMPLES` says how many there are.
"""

import contextlib
import io
import json
import random
import shutil
import sys

import pytest
import yaml
from hydra._internal.utils import get_args_parser
from mutations import as_json, as_yaml, damaged, examples, many, only_refused
from report_runs import row

from finetune import __main__ as sweeps
from finetune import answers, checkpoint, claims, runs
from finetune import config as settings
from finetune.cells import Cell, cells, refusals
from finetune.reporting import read
from finetune.schema import ADAPTERS, OPTIMIZERS, READERS


@pytest.fixture(scope="module")
def cell(tmp_path_factory):
    root = tmp_path_factory.mktemp("multirun")
    words = ["method=lora", "task=jsonl", "task.source.path=rows.jsonl"]
    return cells(get_args_parser().parse_intermixed_args(words), root=root)[0]


@many
def test_a_damaged_configuration_is_refused_and_never_calls(share, cell, told, tmp_path):
    """As a job reads it, and as a sweep compares it with its own."""
    draw, raw = random.Random(1), yaml.safe_dump(dict(cell.config), allow_unicode=True, sort_keys=False).encode()
    for _ in range(examples(0.3 * share)):
        (tmp_path / "config.yaml").write_bytes(as_yaml(raw, draw))
        found = {}

        def load(found=found):
            found |= runs.read_config(tmp_path)
            settings.refuse(found)

        outcome = only_refused(load)
        told[f"configurations {outcome}"] += 1
        if outcome == "read":
            targets = [found["method"]["adapter"], found["task"]["source"], found["optim"]["optimizer"]]
            for part, allowed in zip(targets, (ADAPTERS, READERS, OPTIMIZERS), strict=True):
                assert allowed.fullmatch(part["_target_"])
        assert all(isinstance(line, str) for line in refusals(Cell(cell.config, tmp_path)))


RECORDS = {
    "scores.json": lambda: {"version": 1, "scores": {"mean": {"rouge-1": 1.0}, "tasks": {"NER": {"rouge-1": 1.0}}},
                            "cost": {"train_seconds": 1.0}, "loss": {"valid": 1.0}, "checks": {"loss": {"ok": True, "note": ""}},
                            "num_steps": 3},
    "environment.json": lambda: {"commit": "c", "hashes": {"data": "d" * 64, "weights": "w" * 64, "templates": "t" * 64},
                                 "notes": {"train": 3}},
    "failure.json": lambda: {"kind": "error", "message": "no", "log": ["a"]},
    "owner.json": lambda: claims._me() | {"host": "node7"},
    "unsupported.json": lambda: {"reason": "no"},
    "checkpoint/resumed.json": lambda: [3, 5],
}  # fmt: skip


@many
def test_damaged_records_are_told_for_what_they_are(share, cell, told, tmp_path, monkeypatch):
    """The report names the folder; a sweep sees no other data; a job does not trip over what was resumed."""
    draw = random.Random(2)
    folder = cell.folder
    for number in range(examples(0.2 * share)):
        shutil.rmtree(folder, ignore_errors=True)
        (folder / "checkpoint").mkdir(parents=True)
        runs.write_text(folder / "config.yaml", yaml.safe_dump(dict(cell.config)))
        runs.append_lines(folder / "predictions.jsonl", [row(n, 10.0) for n in range(3)])
        victim = draw.choice([*RECORDS, "predictions.jsonl", "config.yaml"])
        for name in {victim, "environment.json", draw.choice(["scores.json", "failure.json"])} & RECORDS.keys():
            runs.write_text(folder / name, json.dumps(RECORDS[name]()))
        file = folder / victim
        file.write_bytes((as_yaml if victim == "config.yaml" else as_json)(file.read_bytes(), draw))
        found, left_out = read.read_all(folder)
        assert len(found) + len(left_out) == 1
        told["records read" if found else "records left out"] += 1
        hashes = {json.dumps(cell.config["task"], sort_keys=True): "other"}
        assert isinstance(sweeps._other_data(cell, hashes), str | None)
        assert all(isinstance(step, int) for step in resumed(folder))
        if number % 50 == 0:
            reported(folder, monkeypatch)


def resumed(folder):
    from finetune.resume import Keeper

    return Keeper(folder, accelerator=None, num_steps=3, minutes=1, stop=None).resumed()


def reported(folder, monkeypatch):
    """The whole report, in this process."""
    from finetune import report

    monkeypatch.setattr(sys, "argv", ["report", str(folder.parents[4])])
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said), contextlib.suppress(SystemExit):
        report.main()
    assert (folder.parents[3] / "report.md").exists()
    (folder.parents[3] / "report.md").unlink()


STATE = {
    "weights": {"a": [1.0, 2.0]},
    "history": [{"step": 1, "loss": 0.5}],
    "random": (3, (1, 2), None),
    "words": "模型",
}


@pytest.fixture
def kept(tmp_path):
    """A checkpoint's folder, its files, and what is read from it."""
    import torch

    state = STATE | {"tensor": torch.arange(4.0)}
    checkpoint.write(tmp_path, state, step=3, about={"processes": 1})
    [path] = checkpoint.found(tmp_path)
    return path, {file.name: file.read_bytes() for file in path.iterdir()}


@many
def test_a_damaged_checkpoint_is_whole_or_passed_over(share, kept, told):
    """Whatever passes the check is what was written, byte for byte."""
    path, files = kept
    draw, whole = random.Random(3), repr(checkpoint.read(path))
    for _ in range(examples(0.3 * share)):
        name = draw.choice(sorted(files))
        (path / name).write_bytes((as_json if name.endswith("json") else damaged)(files[name], draw))
        outcome = only_refused(lambda: checkpoint.verify(path))
        told[f"checkpoints {outcome}"] += 1
        if outcome == "read":
            assert repr(checkpoint.read(path)) == whole
        (path / name).write_bytes(files[name])


@many
def test_a_checkpoint_that_a_stranger_sealed_is_read_or_refused(share, kept, told, monkeypatch):
    """The sums are right and the content is not: nothing but data comes out."""
    path, files = kept
    monkeypatch.setattr(checkpoint, "_sync", lambda path: None)
    draw = random.Random(4)
    for _ in range(examples(0.1 * share)):
        name = draw.choice([name for name in sorted(files) if name != checkpoint.MANIFEST])
        (path / checkpoint.MANIFEST).unlink()
        (path / name).write_bytes((as_json if name.endswith("json") else damaged)(files[name], draw))
        checkpoint._seal(path, step=3, about={"processes": 1})
        checkpoint.verify(path)
        told[f"sealed checkpoints {only_refused(lambda: checkpoint.read(path))}"] += 1
        (path / name).write_bytes(files[name])


@many
def test_damaged_answers_are_dropped_from_the_first_that_is_wrong(share, told, tmp_path):
    draw, file = random.Random(5), tmp_path / ".predictions-0.jsonl"
    batches = [{"template": 0, "rows": 4, "answers": [[n, [[1, 2], "stop"]]]} for n in range(4)]
    for _ in range(examples(0.1 * share)):
        file.unlink(missing_ok=True)
        for batch in batches:
            answers._append(file, batch)
        file.write_bytes(damaged(file.read_bytes(), draw))
        found = answers._whole(file)
        assert found == batches[: len(found)]
        assert answers._whole(file) == found
        told[f"answers {'whole' if len(found) == 4 else 'cut'}"] += 1
