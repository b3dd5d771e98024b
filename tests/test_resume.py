"""A training that is killed after any step and resumed is the undisturbed training, to the last bit."""

import random

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from conftest import tiny_base
from test_loop import LORA, OPTIM

from finetune import checkpoint, runs
from finetune.data.batches import plan
from finetune.loop import Feeder, Loop, mean_loss
from finetune.methods.build import build
from finetune.resume import Keeper, changing
from finetune.stop import Stop, Stopped

NUM_STEPS = 12
DROPOUT = {**LORA, "lora_dropout": 0.3}
ADALORA = {
    "_target_": "finetune.methods.peft.AdaLora",
    **{"task_type": "CAUSAL_LM", "init_r": 6, "target_r": 3, "target_modules": "all-linear"},
    **{"tinit": 0.1, "tfinal": 0.3, "deltaT": 2, "orth_reg_weight": 0.5, "lora_dropout": 0.1},
}
DELTA = {
    "_target_": "finetune.methods.delta_lora.DeltaLora",
    **{"r": 4, "lora_alpha": 8, "update_ratio": 0.5, "warmup": 0.3, "target_modules": "all-linear"},
}
PREFIX = {"_target_": "finetune.methods.prefix.Prefix", "num_virtual_tokens": 4, "encoder_hidden_size": 8}
CASES = {
    "lora-dropout": {"adapter": DROPOUT},
    "adalora": {"adapter": ADALORA},
    "delta_lora": {"adapter": DELTA},
    "prefix": {"adapter": PREFIX},
    "lora-neftune": {"adapter": LORA, "neftune_alpha": 5.0},
    "full": {"adapter": {"_target_": "finetune.methods.full.Full"}},
    "padded-accumulated": {"adapter": DROPOUT, "packed": False, "accumulation": 2},
    "adamw-8bit": {"adapter": DROPOUT, "optimizer": {"_target_": "bitsandbytes.optim.AdamW8bit"}},
    "momentum": {"adapter": DROPOUT, "optimizer": {"_target_": "torch.optim.SGD", "momentum": 0.9}},
}
ACCELERATOR = Accelerator(cpu=True)


class Killed(Exception):
    """Stands for a kill: nothing after it is done."""


def train(
    folder,
    examples,
    *,
    adapter,
    base=None,
    packed=True,
    tokenizer=None,
    dies_in=None,
    minutes=0.0,
    stop=None,
    lr=1e-2,
    **changes,
):
    """(lines of steps.jsonl, weights and buffers) of a training with a checkpoint after every step.

    Killed when a step is recorded and not yet kept.
    """
    draw = random.SystemRandom().randrange(2**31)  # another process starts with other random numbers
    random.seed(draw), np.random.seed(draw), torch.manual_seed(draw)
    optim = OPTIM | changes
    method = build({"name": "m", "adapter": adapter})
    folder.mkdir(exist_ok=True)
    torch.manual_seed(1)
    model = method.attach(base or tiny_base("qwen2"), tokenizer=tokenizer, num_steps=NUM_STEPS, train_rows=())
    feeder = Feeder(packed=packed, pad_id=0, loss_on="target", device=ACCELERATOR.device)
    steps = plan(len(examples), epochs=9, batch_rows=optim["batch_rows"], max_steps=NUM_STEPS, seed=1)
    keeper = Keeper(folder, accelerator=ACCELERATOR, num_steps=NUM_STEPS, minutes=minutes, stop=stop or Stop())

    def record(line):
        keeper.history.append(line)
        runs.append_lines(folder / "steps.jsonl", [line])
        if line["step"] == dies_in:
            raise Killed

    loop = Loop(method, ACCELERATOR, feeder, examples, steps, optim, lr)
    loop.run(
        model,
        validate=lambda m: mean_loss(m, examples, feeder=feeder, accelerator=ACCELERATOR),
        record=record,
        keeper=keeper,
    )
    return keeper.history, {name: tensor.detach().clone() for name, tensor in changing(model).items()}


def science(lines):
    """What does not depend on the clock."""
    return [{k: v for k, v in line.items() if k not in ("seconds", "tokens_per_second")} for line in lines]


def same(one, other):
    (lines, weights), (other_lines, other_weights) = one, other
    assert science(lines) == science(other_lines)
    assert weights.keys() == other_weights.keys()
    assert all(torch.equal(weights[name], other_weights[name]) for name in weights)


@pytest.mark.parametrize("case", CASES)
def test_killed_in_any_step_and_resumed_it_is_the_undisturbed_run(case, examples, tmp_path):
    whole = train(tmp_path / "whole", examples, **CASES[case])
    assert len({line["loss"] for line in whole[0]}) == NUM_STEPS
    for step in (1, 2, 5, 8, 9, 12):  # 3 steps an epoch; AdaLoRA prunes from 1 to 8, Delta-LoRA moves from 4 on
        with pytest.raises(Killed):
            train(tmp_path / "killed", examples, dies_in=step, **CASES[case])
    same(train(tmp_path / "killed", examples, **CASES[case]), whole)
