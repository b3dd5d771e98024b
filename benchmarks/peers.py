"""The peers: TRL's SFTTrainer, transformers' Trainer, and the loop of PEFT's method comparison.

Each trains LoRA of rank 8 on all linear layers until the meter says that it is over, and returns the model.
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import transformers
from peft import LoraConfig, get_peft_model

from benchmarks.meter import Meter
from benchmarks.rows import PAD, Row, num_tokens
from benchmarks.shapes import LINEAR, base, device, stored, tokenizer

ENDLESS = 100_000  # steps
GROUPED = 50  # batches that transformers sorts by length together, longest first


def cycle(who: str) -> int:
    """The steps of a contender that have a mean length of rows: whole groups, where it groups."""
    return GROUPED if who.startswith("trl-tuned") else 1


def network(shape: str, meter: Meter, *, dtype: torch.dtype, folder: bool) -> Any:
    """Random weights, from a folder or made on the device."""
    with meter.phase("load"):
        if not folder:
            return base(shape, dtype=dtype)
        found: Any = transformers.AutoModelForCausalLM.from_pretrained(stored(shape), dtype=dtype)
        return found.to(device())


def lora() -> LoraConfig:
    """Rank 8 on all linear layers."""
    return LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, target_modules=LINEAR)


def trl(shape: str, meter: Meter, examples: Sequence[Row], *, tuned: bool, batch_rows: int, folder: bool) -> Any:
    """TRL's SFTTrainer with its defaults (float32 weights, bf16 autocast, checkpointing), or tuned."""
    import datasets
    from trl import SFTConfig, SFTTrainer

    data = datasets.Dataset.from_dict(
        {
            "input_ids": [row.ids for row in examples],
            "completion_mask": [[0] * row.num_prompt + [1] * row.num_answer for row in examples],
            "length": [len(row.ids) for row in examples],
        }
    )
    tuning: dict[str, Any] = {}
    if tuned:
        known = "train_sampling_strategy" in SFTConfig.__dataclass_fields__
        grouping = {"train_sampling_strategy": "group_by_length"} if known else {"group_by_length": True}
        tuning = {"gradient_checkpointing": False, "bf16": True, **grouping}
    with tempfile.TemporaryDirectory() as place:
        args = SFTConfig(
            output_dir=place, per_device_train_batch_size=batch_rows, max_length=None, completion_only_loss=True,
            **_common(meter), **tuning,
        )  # fmt: skip
        model = network(shape, meter, dtype=torch.bfloat16 if tuned else torch.float32, folder=folder)
        words = tokenizer(model.config.vocab_size)
        trainer = SFTTrainer(model, args=args, train_dataset=data, processing_class=words, peft_config=lora())
        return _trained(trainer, meter)


def trainer(shape: str, meter: Meter, examples: Sequence[Row], *, batch_rows: int, folder: bool, cpu: bool) -> Any:
    """transformers' Trainer: bf16 (on a GPU), its padding collator, defaults otherwise."""
    with tempfile.TemporaryDirectory() as place:
        args = transformers.TrainingArguments(
            output_dir=place, per_device_train_batch_size=batch_rows, bf16=not cpu, **_common(meter)
        )
        dtype = torch.float32 if cpu else torch.bfloat16  # what from_pretrained makes of bfloat16 files
        model = get_peft_model(network(shape, meter, dtype=dtype, folder=folder), lora())
        return _trained(plain_trainer(model, args, examples, tokenizer(model.config.vocab_size)), meter)


def plain_trainer(model: Any, args: transformers.TrainingArguments, examples: Sequence[Any], words: Any) -> Any:
    """A Trainer over rows that its collator pads."""
    data = [{"input_ids": row.ids, "labels": _labels(row), "attention_mask": [1] * len(row.ids)} for row in examples]
    collator = transformers.DataCollatorForSeq2Seq(words, label_pad_token_id=-100)
    return transformers.Trainer(model=model, args=args, train_dataset=data, data_collator=collator)


def _common(meter: Meter) -> dict[str, Any]:
    """What has nothing to do with speed; the schedule is the trainer's own."""
    return {
        "max_steps": meter.num_steps or ENDLESS, "report_to": [], "save_strategy": "no", "logging_first_step": True,
        "disable_tqdm": True, "learning_rate": 1e-5, "use_cpu": not torch.cuda.is_available(),
    }  # fmt: skip


def _labels(row: Any) -> list[int]:
    return [-100] * row.num_prompt + list(row.ids[row.num_prompt :])


def _trained(trainer: Any, meter: Meter) -> Any:
    """The trainer's model, trained."""
    trainer.add_callback(Watch(meter, counted(trainer)))
    trainer.train()
    return trainer.model


def counted(trainer: Any) -> list[int]:
    """A list that gets the real tokens of every batch that the trainer's collator makes."""
    counts: list[int] = []
    inner: Callable[[Sequence[Any]], Any] = trainer.data_collator

    def collate(items: Sequence[Any]) -> Any:
        counts.append(sum(len(item["input_ids"]) for item in items))
        return inner(items)

    trainer.data_collator = collate
    return counts


class Watch(transformers.TrainerCallback):
    """Tells the meter of every step."""

    def __init__(self, meter: Meter, counts: Sequence[int]) -> None:
        self.meter, self.counts = meter, counts

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A step is done."""
        if self.meter.step(self.counts[state.global_step - 1]):
            control.should_training_stop = True

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """The first logged loss is that of the base."""
        self.meter.first_loss = self.meter.first_loss or (logs or {}).get("loss", 0.0)


def comparison_loop(shape: str, meter: Meter, examples: Sequence[Row], *, batch_rows: int, folder: bool) -> Any:
    """The loop of PEFT's method comparison: bf16 weights, autocast, batches of similar length, padded, all logits."""
    model = get_peft_model(network(shape, meter, dtype=torch.bfloat16, folder=folder), lora()).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, ENDLESS)
    for part in buckets(examples, size=batch_rows):
        batch = {key: torch.tensor(value, device=model.device) for key, value in padded(part).items()}
        with torch.autocast(model.device.type, torch.bfloat16):
            loss = model(**batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        meter.first_loss = meter.first_loss or loss.item()
        if meter.step(num_tokens(part)):
            break
    return model


def padded(part: Sequence[Row]) -> dict[str, list[list[int]]]:
    """Right-padded ids, mask and labels."""
    longest = max(len(row.ids) for row in part)
    gaps = [longest - len(row.ids) for row in part]
    return {
        "input_ids": [row.ids + [PAD] * gap for row, gap in zip(part, gaps, strict=True)],
        "attention_mask": [[1] * len(row.ids) + [0] * gap for row, gap in zip(part, gaps, strict=True)],
        "labels": [_labels(row) + [-100] * gap for row, gap in zip(part, gaps, strict=True)],
    }


def buckets(examples: Sequence[Row], *, size: int) -> Iterator[list[Row]]:
    """Batches of similar length: twenty are drawn at random, sorted by length, and cut."""
    draw = random.Random(1)
    while True:
        order = draw.sample(list(examples), len(examples))
        for first in range(0, len(order), 20 * size):
            part = sorted(order[first : first + 20 * size], key=lambda row: len(row.ids))
            yield from (part[i : i + size] for i in range(0, len(part) - size + 1, size))
