"""Run folders as the architecture describes them, written by hand."""

import json

import pytest
import yaml


@pytest.fixture
def multirun(tmp_path):
    folder = tmp_path / "multirun"
    folder.mkdir()
    return folder


@pytest.fixture
def make_run(multirun):
    """`make_run(method="lora", rouge=60.0)` writes a done run; `state=` another one; returns its folder."""

    def make(*, study="main", task="clinic", model="qwen", method="lora", seed=1, state="done", **details):
        folder = multirun / study / task / model / method / f"seed{seed}"
        folder.mkdir(parents=True)
        names = {
            group: {"name": part.split("+")[0]}
            for group, part in (("task", task), ("model", model), ("method", method))
        }
        (folder / "config.yaml").write_text(yaml.safe_dump({"study": study, "seed": seed, **names}), encoding="utf-8")
        hashes = {"data": "d" * 64, "weights": details.get("weights", "w" * 64), "templates": "t" * 64}
        (folder / "environment.json").write_text(json.dumps({"commit": "c", "hashes": hashes}))
        for name, content in MARKS[state](details).items():
            (folder / name).write_text(json.dumps(content), encoding="utf-8")
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in details.get("rows", ())]
        if lines:
            (folder / "predictions.jsonl").write_text("".join(lines), encoding="utf-8")
        return folder

    return make


MARKS = {
    "done": lambda details: {"scores.json": scores(**details)},
    "failed": lambda details: {"failure.json": {"kind": "error", "message": details.get("reason", ""), "log": []}},
    "unsupported": lambda details: {"unsupported.json": {"reason": details.get("reason", "")}},
    "running": lambda details: {"owner.json": {"host": "node7", "pid": 12, "started": 0, "heartbeat": 0}},
    "unfinished": lambda details: {},
}


def scores(*, rouge=50.0, trainable=1_234_567, seconds=30.0, tasks=("NER", "REPORT"), more=None, **_):
    row = {f"rouge-{kind}{suffix}": rouge for kind in "12l" for suffix in ("", "-multiset")}
    row |= {"exact": 10.0, "empty": 0.0, "never_stopped": 5.0, "looping": 2.5, "num_rows": 100}
    cost = {"trainable_parameters": trainable, "total_parameters": 10_000_000, "trainable_percent": trainable / 1e5,
            "peak_memory_gib": None, "train_seconds": seconds, "tokens_per_second": 1e4 / seconds, "adapter_mb": 4.9}  # fmt: skip
    shown = {"mean": row | {"num_rows": 100 * len(tasks)}, "tasks": dict.fromkeys(tasks, row)}
    return {
        "version": 1,
        "scores": shown,
        "cost": cost,
        "loss": {"train": 1.0, "valid": 1.1},
        "num_steps": 40,
        **(more or {}),
    }


def row(number, score, *, task="NER", **changed):
    """A line of predictions.jsonl that scores `score` in every convention."""
    names = {
        f"rouge-{kind}{suffix}": score for kind in "12l" for suffix in ("", "-multiset", "-char", "-char-multiset")
    }
    same = {
        "id": str(number),
        "task": task,
        "kind": "dialogue",
        "prompt": f"问题{number}",
        "template": 0,
        "choices": None,
    }
    texts = {"reference": f"参考{number}", "prediction": f"回答{number}", "finish_reason": "stop"}
    return same | texts | {"scores": names} | changed


def write_base(folder):
    """A random Qwen2 base with a tokenizer of single bytes, as a folder; returns it."""
    from conftest import tiny_base
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: n for n, token in enumerate(["<pad>", "<bos>", "<eos>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tiny_base("qwen2", vocab_size=len(vocabulary)).save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>").save_pretrained(folder)
    return folder
