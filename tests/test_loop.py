import contextlib

import pytest
import torch
from accelerate import Accelerator
from conftest import tiny_base

from finetune.data.batches import plan
from finetune.feeder import Feeder, mean_loss
from finetune.loop import Loop
from finetune.methods.build import build
from finetune.schedule import schedule_factor

OPTIM = {
    "optimizer": {"_target_": "torch.optim.AdamW", "weight_decay": 0.0},
    "schedule": "cosine",
    "warmup": 0.1,
    "batch_rows": 4,
    "accumulation": 1,
    "max_grad_norm": 1.0,
    "loss_on": "target",
    "validations": 2,
}
LORA = {"_target_": "peft.LoraConfig", "task_type": "CAUSAL_LM", "r": 4, "target_modules": "all-linear"}


def train(examples, *, architecture="qwen2", packed=True, adapter=LORA, lr=1e-2, **changes):
    """Losses of nine steps."""
    optim = OPTIM | changes
    accelerator = Accelerator(cpu=True)
    method = build({"name": "m", "adapter": adapter})
    torch.manual_seed(0)
    model = method.attach(tiny_base(architecture), tokenizer=None, num_steps=9, train_rows=())
    feeder = Feeder(packed=packed, pad_id=0, loss_on=optim["loss_on"], device=accelerator.device)
    steps = plan(len(examples), epochs=3, batch_rows=optim["batch_rows"], max_steps=None, seed=1)
    loop = Loop(method, accelerator, feeder, examples, steps, optim, lr)
    lines = []
    loop.run(
        model, validate=lambda m: mean_loss(m, examples, feeder=feeder, accelerator=accelerator), record=lines.append
    )
    return lines


def losses(lines):
    return [line["loss"] for line in lines]


def test_training_lowers_the_loss(examples):
    lines = train(examples)
    assert lines[-1]["valid_loss"] < lines[3]["valid_loss"]
    assert [line["step"] for line in lines if "valid_loss" in line] == [4, 9]


def test_packed_equals_padded(examples):
    assert losses(train(examples, packed=True)) == pytest.approx(losses(train(examples, packed=False)), rel=1e-4)


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
def test_accumulation_weighs_every_token_the_same(examples, packed):
    once, twice = (losses(train(examples, packed=packed, accumulation=n)) for n in (1, 2))
    assert twice == pytest.approx(once, rel=1e-4)


def test_losses_that_are_no_numbers_end_the_run_and_name_the_steps(examples):
    with pytest.raises(FloatingPointError, match=r"step 4: .* steps 2 to 4 were skipped"):
        train(examples, lr=1e30, max_grad_norm=None)


@pytest.mark.parametrize(
    ("schedule", "last"), [("cosine", 0.0), ("linear", 0.0), ("constant", 1.0)], ids=["cosine", "linear", "constant"]
)
def test_schedules_warm_up_and_end(schedule, last):
    optim = {"warmup": 0.1, "schedule": schedule}
    factors = [schedule_factor(step, 100, optim) for step in range(101)]
    assert factors[0] < factors[5] < factors[10] == 1.0
    assert factors[100] == pytest.approx(last, abs=1e-12)
    assert all(0 <= factor <= 1 for factor in factors)


def test_the_same_seed_gives_the_same_losses(examples):
    with contextlib.suppress(RuntimeError):
        torch.set_num_threads(1)
    assert losses(train(examples)) == losses(train(examples))
