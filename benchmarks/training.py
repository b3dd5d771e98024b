"""How fast does a step run? This project and its peers, side by side on one GPU, random weights of true shapes.

    python -m benchmarks.training --shapes 0.5B,1.5B,7B --seconds 30 --out FILE.jsonl

Every contender is a process of its own; all get the same rows (lengths like the three PromptCBLUE tasks: mean 240, at
most 1077 tokens, 15 % of them supervised) and LoRA of rank 8 on all linear layers. A rate counts real tokens between
two moments at which the device is idle, after the warm-up. The first loss is that of the base: it must be equal.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

SHAPES: dict[str, dict[str, Any]] = {  # of Qwen2.5
    "tiny": {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
             "intermediate_size": 128, "tie_word_embeddings": True, "vocab_size": 512},
    "0.5B": {"hidden_size": 896, "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2,
             "intermediate_size": 4864, "tie_word_embeddings": True, "vocab_size": 151936},
    "1.5B": {"hidden_size": 1536, "num_hidden_layers": 28, "num_attention_heads": 12, "num_key_value_heads": 2,
             "intermediate_size": 8960, "tie_word_embeddings": True, "vocab_size": 151936},
    "7B": {"hidden_size": 3584, "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4,
           "intermediate_size": 18944, "tie_word_embeddings": False, "vocab_size": 152064},
}  # fmt: skip
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
WARM_UP = 8  # steps that no rate counts
GROUPED = 50  # batches that transformers sorts by length together, longest first: only whole ones have a mean length


@dataclass(frozen=True)
class Row:
    """A row as tokens."""

    ids: list[int]
    num_prompt: int


# The three PromptCBLUE tasks IMCS-V2-DAC, CMeEE-V2 and IMCS-V2-MRG: training rows, mean tokens, supervised share.
TASKS = ((1536, 125, 0.05), (1492, 125, 0.35), (872, 640, 0.11))
SPREAD = 0.35  # of the logarithm of a length


def rows(count: int, *, vocab_size: int) -> list[Row]:
    """Rows of random tokens, mixed and as long as those of the three tasks: mean 240, at most 1077 tokens."""
    draw = random.Random(0)
    found = []
    for _, mean, share in draw.choices(TASKS, weights=[task[0] for task in TASKS], k=count):
        length = draw.lognormvariate(math.log(mean) - SPREAD**2 / 2, SPREAD)
        number = min(1077, max(40, round(length)))
        answer = max(2, round(share * number))
        found.append(Row([draw.randrange(5, vocab_size) for _ in range(number)], number - answer))
    return found


def base(shape: str, *, dtype: torch.dtype) -> Any:
    """Random weights, made on the device."""
    torch.manual_seed(0)
    config = transformers.Qwen2Config(**SHAPES[shape], max_position_embeddings=4096)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.device(device):
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
        finally:
            torch.set_default_dtype(before)


class Meter:
    """Real tokens per second, measured between idle moments of the device."""

    def __init__(self, seconds: float, *, cycle: int = 1) -> None:
        self.seconds, self.cycle = seconds, cycle  # only whole cycles of steps count
        self.began = time.perf_counter()
        self.start = 0.0
        self.steps = self.tokens = 0
        self.first_loss = 0.0

    def step(self, num_tokens: int) -> bool:
        """Count a step; True when the time is over."""
        self.steps += 1
        if self.steps == WARM_UP:
            self.start, self.tokens = self._now(), 0
            self.start_up = self.start - self.began
        elif self.steps > WARM_UP:
            self.tokens += num_tokens
            whole = (self.steps - WARM_UP) % self.cycle == 0
            if whole and time.perf_counter() - self.start > self.seconds:
                self.took = self._now() - self.start
                return True
        return False

    def result(self) -> dict[str, Any]:
        """What a table shows."""
        cuda = torch.cuda.is_available()
        return {
            "tokens_per_second": self.tokens / self.took,
            "steps_per_second": (self.steps - WARM_UP) / self.took,
            "start_up_seconds": self.start_up,
            "first_loss": self.first_loss,
            "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if cuda else 0.0,
        }

    def _now(self) -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()


class Over(Exception):
    """The time is over."""


def ours(shape: str, meter: Meter, *, method: str, step: str, batch_rows: int) -> None:
    """This project's own loop."""
    from accelerate import Accelerator
    from hydra import compose, initialize_config_dir

    from finetune.cells import CONF
    from finetune.data.batches import plan
    from finetune.feeder import Feeder
    from finetune.loop import Loop
    from finetune.methods.build import build

    changes = ["method.adapter.r=8", "method.adapter.lora_alpha=16"] if method in ("lora", "qlora") else []
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("config", ["model=qwen", f"method={method}", *changes])
    from omegaconf import OmegaConf

    settings: Any = OmegaConf.to_container(config, resolve=True)
    accelerator = Accelerator(mixed_precision="bf16", cpu=not torch.cuda.is_available())
    tuner = build(settings["method"])
    precision = torch.bfloat16 if tuner.leaves_base_intact else torch.float32
    network = base(shape, dtype=precision)
    if settings["method"]["quantize"]:
        network = quantized(network)
    examples = rows(4000, vocab_size=SHAPES[shape]["vocab_size"])
    model = tuner.attach(network, tokenizer=None, num_steps=1000, train_rows=())
    feeder = Feeder(packed=True, pad_id=0, loss_on="target", device=accelerator.device)
    steps = plan(len(examples), epochs=40, batch_rows=batch_rows, max_steps=None, seed=1)
    optim = {**settings["optim"], "validations": 0}
    loop = Loop(tuner, accelerator, feeder, examples, steps, optim, 1e-5, way=step)

    def record(line: dict[str, Any]) -> None:
        meter.first_loss = meter.first_loss or line["loss"]
        if meter.step(sum(len(examples[row].ids) for row in steps[line["step"] - 1])):
            raise Over

    loop.run(model, validate=lambda _: 0.0, record=record)


def quantized(network: Any) -> Any:
    """The linear layers of the blocks in 4-bit NormalFloat with double quantisation."""
    from bitsandbytes.nn import Linear4bit

    for block in network.model.layers:
        for part in (block.self_attn, block.mlp):
            for name, layer in list(part.named_children()):
                if isinstance(layer, torch.nn.Linear):
                    how = {"compute_dtype": torch.bfloat16, "compress_statistics": True, "quant_type": "nf4"}
                    new = Linear4bit(layer.in_features, layer.out_features, layer.bias is not None, **how)
                    new.load_state_dict(layer.state_dict())
                    setattr(part, name, new.to(layer.weight.device))
    return network


def lora(model: Any) -> Any:
    """PEFT's LoRA as every peer gets it."""
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, lora_config(LoraConfig))


def lora_config(kind: Any) -> Any:
    """Rank 8 on all linear layers."""
    return kind(task_type="CAUSAL_LM", r=8, lora_alpha=16, target_modules=LINEAR)


def trl(shape: str, meter: Meter, *, tuned: bool, batch_rows: int) -> None:
    """TRL's SFTTrainer with its defaults (float32 weights, bf16 autocast, checkpointing), or tuned."""
    import datasets
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer

    examples = rows(4000, vocab_size=SHAPES[shape]["vocab_size"])
    data = datasets.Dataset.from_dict(
        {
            "input_ids": [row.ids for row in examples],
            "completion_mask": [[0] * row.num_prompt + [1] * (len(row.ids) - row.num_prompt) for row in examples],
            "length": [len(row.ids) for row in examples],
        }
    )
    tuning: dict[str, Any] = {}
    if tuned:
        tuning = {"gradient_checkpointing": False, "bf16": True}
        known = SFTConfig.__dataclass_fields__
        if "train_sampling_strategy" in known:
            tuning["train_sampling_strategy"] = "group_by_length"
        else:
            tuning["group_by_length"] = True
    with tempfile.TemporaryDirectory() as folder:
        args = SFTConfig(
            output_dir=folder, per_device_train_batch_size=batch_rows, max_steps=100_000, max_length=None,
            report_to=[], save_strategy="no", logging_steps=1 if not tuned else 10, disable_tqdm=True,
            completion_only_loss=True, use_cpu=not torch.cuda.is_available(), learning_rate=1e-5, **tuning,
        )  # fmt: skip
        model = base(shape, dtype=torch.bfloat16 if tuned else torch.float32)
        trainer = SFTTrainer(
            model, args=args, train_dataset=data, processing_class=tokenizer(), peft_config=lora_config(LoraConfig)
        )
        counts: list[int] = []
        inner = trainer.data_collator

        def collate(items: Sequence[Any]) -> Any:
            counts.append(sum(len(item["input_ids"]) for item in items))
            return inner(items)

        trainer.data_collator = collate

        class Watch(transformers.TrainerCallback):
            def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                if meter.step(counts[state.global_step - 1]):
                    control.should_training_stop = True

            def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
                meter.first_loss = meter.first_loss or (logs or {}).get("loss", 0.0)

        trainer.add_callback(Watch())
        trainer.train()


def tokenizer() -> Any:
    """One that only has the special tokens: rows are token ids already."""
    from tokenizers import Tokenizer, models

    words = {"<pad>": 0, "<end>": 1, "<unk>": 2}
    inner = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="<end>", unk_token="<unk>"
    )


def comparison_loop(shape: str, meter: Meter, *, batch_rows: int) -> None:
    """The loop of PEFT's method comparison: bf16 weights, autocast, batches of similar length, padded, all logits."""
    model = lora(base(shape, dtype=torch.bfloat16)).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 100_000)
    examples = rows(4000, vocab_size=SHAPES[shape]["vocab_size"])
    device = next(model.parameters()).device
    for part in buckets(examples, size=batch_rows):
        longest = max(len(row.ids) for row in part)
        ids = torch.tensor([row.ids + [0] * (longest - len(row.ids)) for row in part], device=device)
        mask = torch.tensor([[1] * len(row.ids) + [0] * (longest - len(row.ids)) for row in part], device=device)
        targets = [[-100] * row.num_prompt + row.ids[row.num_prompt :] for row in part]
        labels = torch.tensor([t + [-100] * (longest - len(t)) for t in targets], device=device)
        with torch.autocast(device.type, torch.bfloat16):
            loss = model(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        meter.first_loss = meter.first_loss or loss.item()
        if meter.step(sum(len(row.ids) for row in part)):
            return


def buckets(examples: Sequence[Row], *, size: int) -> Iterator[list[Row]]:
    """Batches of similar length: twenty are drawn at random, sorted by length, and cut."""
    draw = random.Random(1)
    while True:
        order = draw.sample(list(examples), len(examples))
        for first in range(0, len(order), 20 * size):
            part = sorted(order[first : first + 20 * size], key=lambda row: len(row.ids))
            yield from (part[i : i + size] for i in range(0, len(part) - size + 1, size))


CONTENDERS: dict[str, Any] = {
    "compiled": lambda s, m: ours(s, m, method="lora", step="compiled", batch_rows=8),
    "graph": lambda s, m: ours(s, m, method="lora", step="graph", batch_rows=8),
    "eager": lambda s, m: ours(s, m, method="lora", step="eager", batch_rows=8),
    "compiled-64": lambda s, m: ours(s, m, method="lora", step="compiled", batch_rows=64),
    "compiled-32": lambda s, m: ours(s, m, method="lora", step="compiled", batch_rows=32),
    "compiled-4": lambda s, m: ours(s, m, method="lora", step="compiled", batch_rows=4),
    "trl": lambda s, m: trl(s, m, tuned=False, batch_rows=8),
    "trl-tuned": lambda s, m: trl(s, m, tuned=True, batch_rows=8),
    "trl-tuned-32": lambda s, m: trl(s, m, tuned=True, batch_rows=32),
    "peft": lambda s, m: comparison_loop(s, m, batch_rows=4),
    **{
        f"{method}-{step}": lambda s, m, method=method, step=step: ours(s, m, method=method, step=step, batch_rows=8)
        for method in ("qlora", "adalora", "prefix", "prompt", "ptuning", "ptuning_v2", "full", "adapter", "dora")
        for step in ("compiled", "graph", "eager")
    },
}


def main() -> None:
    """Run contenders, each in its own process; one JSON line each."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--shapes", default="0.5B")
    parser.add_argument("--who", default="compiled,graph,eager,trl,trl-tuned,peft")
    parser.add_argument("--seconds", type=float, default=30)
    parser.add_argument("--out", type=Path, default=Path("training.jsonl"))
    parser.add_argument("--inside", nargs=2, metavar=("SHAPE", "WHO"))
    args = parser.parse_args()
    if args.inside:
        shape, who = args.inside
        meter = Meter(args.seconds, cycle=GROUPED if who.startswith("trl-tuned") else 1)
        with contextlib.suppress(Over):
            CONTENDERS[who](shape, meter)
        print(json.dumps({"shape": shape, "who": who, **meter.result()}))
        return
    for shape in args.shapes.split(","):
        for who in args.who.split(","):
            words = ["-m", "benchmarks.training", "--inside", shape, who, "--seconds", str(args.seconds)]
            child = subprocess.run([sys.executable, *words], capture_output=True, text=True, check=False)
            last = (child.stdout.strip().splitlines() or [""])[-1]
            if child.returncode or not last.startswith("{"):
                why = (child.stderr.strip() or child.stdout.strip())[-700:]
                last = json.dumps({"shape": shape, "who": who, "failed": why})
            print(last, flush=True)
            with args.out.open("a") as file:
                file.write(last + "\n")


if __name__ == "__main__":
    main()
