"""Bases, GGUF headers and adapters, damaged: each is loaded, or refused by its name. `FUZZ_EXAMPLES` says how many."""

import random
import shutil
import sys
from pathlib import Path

import pytest
from mutations import as_json, damaged, examples, many, only_refused
from report_runs import write_base

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
