"""What lies in folders, damaged: configurations, records, checkpoints, weights, adapters. Each is read, or refused.

Damaged are the bytes of every file, and the values that YAML and JSON hold. `FUZZ_EXAMPLES` says how many there are.
"""

import collections
import contextlib
import io
import json
import random
import shutil
import sys
from pathlib import Path

import pytest
import yaml
from hydra._internal.utils import get_args_parser
from mutations import changed, damaged, examples
from report_runs import row, write_base

from finetune import __main__ as sweeps
from finetune import answers, checkpoint, claims, runs
from finetune import config as settings
from finetune.cells import Cell, cells, refusals
from finetune.config import ADAPTERS, OPTIMIZERS, READERS
from finetune.reporting import read

FEW = 1 / 80  # of the files of a whole run, for the tests that always run
many = pytest.mark.parametrize(
    "share", [pytest.param(FEW, id="few"), pytest.param(1, id="many", marks=pytest.mark.faults)]
)


@pytest.fixture
def told(capsys):
    """Prints how many files had which outcome."""
    counts = collections.Counter()
    yield counts
    with capsys.disabled():
        print("", dict(sorted(counts.items())), end=" ")


@pytest.fixture(scope="module")
def cell(tmp_path_factory):
    root = tmp_path_factory.mktemp("multirun")
    words = ["method=lora", "task=jsonl", "task.source.path=rows.jsonl"]
    return cells(get_args_parser().parse_intermixed_args(words), root=root)[0]


def spoiled_text(raw, draw, *, write, load):
    """The file's bytes or its values damaged."""
    if draw.random() < 0.5:
        return damaged(raw, draw)
    with contextlib.suppress(ValueError, yaml.YAMLError, UnicodeError):
        return write(changed(load(raw), draw)).encode(errors="surrogatepass")
    return damaged(raw, draw)


def as_json(raw, draw):
    return spoiled_text(raw, draw, write=json.dumps, load=json.loads)


def as_yaml(raw, draw):
    return spoiled_text(raw, draw, write=lambda v: yaml.safe_dump(v, allow_unicode=True), load=yaml.safe_load)


def only_refused(act):
    """`read`, or `refused` for a ValueError that says so in a few words."""
    said = ""
    try:
        act()
    except ValueError as error:
        said = str(error) or "nothing"
    assert len(said) < 20_000
    return "refused" if said else "read"


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


MODEL = {
    "name": "x", "architecture": "Qwen2ForCausalLM", "precision": "float32", "hub": "huggingface",
    "trust_remote_code": False, "rope_scaling": None, "eos_tokens": ["<eos>"], "template": None,
}  # fmt: skip


def loaded(path, architecture="Qwen2ForCausalLM"):
    """A base as a job loads it; the run is not refused for a base whose numbers changed: its hash is recorded."""
    from finetune.models.load import load

    model = MODEL | {"path": str(path), "architecture": architecture}
    load(model, scale="tiny", quantize=None, device="cpu", max_tokens=64, log=lambda *line: None)


@many
def test_a_damaged_base_is_loaded_or_refused(share, told, tmp_path, monkeypatch):
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / "cache"))
    base, draw = write_base(tmp_path / "base"), random.Random(6)
    files = {file.name: file.read_bytes() for file in base.iterdir()}
    assert only_refused(lambda: loaded(base)) == "read"
    for _ in range(examples(0.05 * share)):
        name = draw.choice(sorted(files))
        raw = files[name]
        if name.endswith("json"):
            (base / name).write_bytes(as_json(raw, draw))
        else:  # the header of safetensors, where damage is more than another number
            size = 8 + int.from_bytes(raw[:8], "little")
            (base / name).write_bytes(damaged(raw[:size], draw) + raw[size:])
        told[f"bases {only_refused(lambda: loaded(base))}"] += 1
        (base / name).write_bytes(files[name])


@many
def test_a_damaged_gguf_header_is_loaded_or_refused(share, told, tmp_path, monkeypatch):
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / "cache"))
    file, draw = gguf_file(tmp_path), random.Random(7)
    raw = file.read_bytes()
    size = 24 + raw.index(b"token_embd") // 2  # the header, before the names of the tensors
    assert only_refused(lambda: loaded(file, "LlamaForCausalLM")) == "read"
    for _ in range(examples(0.02 * share)):
        shutil.rmtree(tmp_path / "cache", ignore_errors=True)
        cut = draw.choice((64, size, len(raw)))
        file.write_bytes(damaged(raw[:cut], draw) + raw[cut:])
        told[f"gguf {only_refused(lambda: loaded(file, 'LlamaForCausalLM'))}"] += 1


def gguf_file(folder):
    """A random Llama as llama.cpp stores it."""
    sys.path.append(str(Path(__file__).parent.parent / "models"))
    import gguf
    from conftest import tiny_base
    from loopback import make_tokenizer
    from test_load import write_gguf

    tokenizer = make_tokenizer("chatml")
    write_gguf(folder / "tiny.gguf", tiny_base("llama", vocab_size=len(tokenizer)), tokenizer)
    assert gguf.GGUFReader(folder / "tiny.gguf").tensors
    return folder / "tiny.gguf"


ADAPTED = {
    "lora": {"_target_": "peft.LoraConfig", "task_type": "CAUSAL_LM", "r": 2, "target_modules": ["q_proj"]},
    "prefix": {"_target_": "finetune.methods.prefix.Prefix", "num_virtual_tokens": 2, "encoder_hidden_size": 4},
    "bottleneck": {"_target_": "finetune.methods.bottleneck.Adapter", "size": 2, "places": ["attention"],
                   "activation": "gelu", "parallel": False, "scale": 1.0},
}  # fmt: skip


@many
@pytest.mark.parametrize("name", ADAPTED)
def test_a_damaged_adapter_folder_is_loaded_or_fails(name, share, told, tmp_path):
    """It is the run's own, so that any error will do: none of it may end the process, or be half loaded."""
    from conftest import tiny_base

    from finetune.methods.build import build

    folder, draw = tmp_path / "adapter", random.Random(8)
    folder.mkdir()

    def method():
        return build({"name": name, "adapter": ADAPTED[name]})

    tuned = method()
    tuned.save(tuned.attach(tiny_base("qwen2"), tokenizer=None, num_steps=3, train_rows=()), folder)
    files = {file.name: file.read_bytes() for file in folder.iterdir()}
    method().load(tiny_base("qwen2"), folder)
    for _ in range(examples(0.01 * share)):
        victim = draw.choice(sorted(files))
        raw = files[victim]
        (folder / victim).write_bytes((as_json if victim.endswith("json") else damaged)(raw, draw))
        try:
            method().load(tiny_base("qwen2"), folder)
            told[f"{name} loaded"] += 1
        except Exception:
            told[f"{name} refused"] += 1
        (folder / victim).write_bytes(raw)
