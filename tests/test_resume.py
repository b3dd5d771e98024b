"""A training that is killed after any step and resumed is the undisturbed training, to the last bit."""

import random
import shutil

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from conftest import tiny_base
from test_loop import LORA, OPTIM

from finetune import checkpoint, gradients, outcome, runs
from finetune.data.batches import plan
from finetune.feeder import Feeder, mean_loss
from finetune.loop import Loop
from finetune.methods.build import build
from finetune.resume import Keeper, changing, refuse_small_disk
from finetune.stop import Stop, Stopped

NUM_STEPS = 12
DROPOUT = {**LORA, "lora_dropout": 0.3}
ADALORA = {
    "_target_": "finetune.methods.adalora.AdaLora",
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


def train(folder, examples, *, adapter, packed=True, lr=1e-2, minutes=0.0, stop=None, limit=None, **changes):  # noqa: PLR0913
    """(lines of steps.jsonl, weights and buffers) of a training with a checkpoint after every step.

    `dies_in`: a kill when that step is recorded and not yet kept; `then` is called with each line; `room`: tokens that
    fit into memory; `broken`: steps whose loss is no number.
    """
    draw = random.SystemRandom().randrange(2**31)  # another process starts with other random numbers
    random.seed(draw), np.random.seed(draw), torch.manual_seed(draw)
    dies_in, then, room, broken, base, tokenizer = (
        changes.pop(name, None) for name in ("dies_in", "then", "room", "broken", "base", "tokenizer")
    )
    optim = OPTIM | changes
    method = build({"name": "m", "adapter": adapter})
    folder.mkdir(exist_ok=True)
    torch.manual_seed(1)
    base = base or tiny_base("qwen2")
    model = method.attach(base, tokenizer=tokenizer, num_steps=NUM_STEPS, train_rows=())
    feeder = Feeder(packed=packed, pad_id=0, loss_on="target", device=ACCELERATOR.device, max_tokens=limit)
    steps = plan(len(examples), epochs=9, batch_rows=optim["batch_rows"], max_steps=NUM_STEPS, seed=1)
    keeper = Keeper(folder, accelerator=ACCELERATOR, num_steps=NUM_STEPS, minutes=minutes, stop=stop or Stop())

    def record(line):
        line = outcome.finite(line)
        keeper.history.append(line)
        runs.append_lines(folder / "steps.jsonl", [line])
        if then:
            then(line)
        if line["step"] == dies_in:
            raise Killed

    def crowd(module, args, kwargs):
        if module.training and kwargs["input_ids"].numel() > room:
            torch.rand(3)  # what was drawn before memory ran out
            raise torch.OutOfMemoryError("out of memory")

    def spoil(head, args, output):
        return output * float("nan") if base.training and len(keeper.history) + 1 in broken else output

    if room:
        base.register_forward_pre_hook(crowd, with_kwargs=True)
    if broken:
        base.get_output_embeddings().register_forward_hook(spoil)
    ids = [f"r{n}" for n in range(len(examples))]
    Loop(method, ACCELERATOR, feeder, examples, steps, optim, lr, ids).run(
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
    whole = train(tmp_path / "whole", examples, minutes=60, **CASES[case])
    assert len({line["loss"] for line in whole[0]}) == NUM_STEPS
    # 3 steps an epoch; AdaLoRA prunes from step 1 to 8, Delta-LoRA moves from 4 on
    for step in (1, 2, 4, 8, 9, 12) if case == "lora-dropout" else (3, 9):
        with pytest.raises(Killed):
            train(tmp_path / "killed", examples, dies_in=step, **CASES[case])
    same(train(tmp_path / "killed", examples, minutes=60, **CASES[case]), whole)


@pytest.fixture
def half_done(examples, tmp_path):
    """A training that was killed in its sixth step: its folder, and the undisturbed one's outcome."""
    whole = train(tmp_path / "whole", examples, adapter=DROPOUT, minutes=60)
    with pytest.raises(Killed):
        train(tmp_path / "killed", examples, adapter=DROPOUT, dies_in=6)
    return tmp_path / "killed", whole


def kept(folder):
    return [checkpoint.step(path) for path in checkpoint.found(folder / "checkpoint")]


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(half_done, examples, caplog):
    folder, whole = half_done
    assert kept(folder) == [4, 5]
    (folder / "checkpoint" / "step-000005" / "state.json").unlink()
    same(train(folder, examples, adapter=DROPOUT), whole)
    assert "step-000005 is passed over: state.json is missing" in caplog.text
    assert (folder / "checkpoint" / "resumed.json").read_text() == "[4]"


def test_without_a_whole_checkpoint_it_starts_again_and_says_so(half_done, examples, caplog):
    folder, whole = half_done
    for path in checkpoint.found(folder / "checkpoint"):
        (path / "manifest.json").write_text("")
    (folder / ".predictions-0.jsonl").write_text("of other weights")
    same(train(folder, examples, adapter=DROPOUT), whole)
    assert "starting at the beginning" in caplog.text
    assert not (folder / ".predictions-0.jsonl").exists()
    assert not (folder / "checkpoint" / "resumed.json").exists()


def test_a_checkpoint_of_another_plan_is_not_gone_on_from(half_done, examples, caplog, monkeypatch):
    folder, _ = half_done
    monkeypatch.setattr("test_resume.NUM_STEPS", 9)
    train(folder, examples, adapter=DROPOUT)
    assert "made with other settings (steps: 12 -> 9)" in caplog.text


def test_a_checkpoint_of_other_weights_is_refused(half_done, examples):
    folder, _ = half_done
    with pytest.raises(ValueError, match="of another"):
        train(folder, examples, adapter={**DROPOUT, "r": 2})


def test_steps_that_no_checkpoint_holds_are_done_again(half_done, examples):
    folder, whole = half_done
    with (folder / "steps.jsonl").open("a") as file:
        file.write('{"step": 7, "lo')
    same(train(folder, examples, adapter=DROPOUT), whole)
    lines = (folder / "steps.jsonl").read_text().splitlines()
    assert len(lines) == NUM_STEPS


def test_checkpoints_follow_the_clock_and_the_last_one_holds_no_optimizer(examples, tmp_path):
    train(tmp_path, examples, adapter=DROPOUT, minutes=60)
    assert kept(tmp_path) == [NUM_STEPS]
    [path] = checkpoint.found(tmp_path / "checkpoint")
    assert set(checkpoint.read(path)) == {"model", "method", "random", "history"}


def test_a_request_to_stop_ends_the_step_and_keeps_it(examples, tmp_path):
    whole = train(tmp_path / "whole", examples, adapter=DROPOUT, minutes=60)
    stop = Stop()

    def asked_in(step):
        def record(line):
            stop.asked |= line["step"] == step

        return record

    with pytest.raises(Stopped):
        train(tmp_path / "stopped", examples, adapter=DROPOUT, minutes=60, stop=stop, then=asked_in(4))
    assert kept(tmp_path / "stopped") == [4]
    same(train(tmp_path / "stopped", examples, adapter=DROPOUT, minutes=60), whole)


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
def test_out_of_memory_halves_the_batches_and_not_the_step(packed, examples, tmp_path):
    case = {"adapter": LORA, "packed": packed, "max_grad_norm": None, "minutes": 60}
    whole, _ = train(tmp_path / "whole", examples, **case)
    found, _ = train(tmp_path / "small", examples, room=60, **case)
    assert [line["loss"] for line in found] == pytest.approx([line["loss"] for line in whole], rel=1e-4)
    assert found[-1]["micro_batch_tokens"] <= 60
    assert found[-1]["micro_batch_halvings"] >= 1
    assert "micro_batch_tokens" not in whole[-1]


def test_a_retried_step_draws_the_same_noise_and_small_batches_outlive_a_kill(examples, tmp_path):
    case = {"adapter": DROPOUT, "room": 60}
    whole = train(tmp_path / "whole", examples, **case)
    with pytest.raises(Killed):
        train(tmp_path / "killed", examples, dies_in=7, **case)
    same(train(tmp_path / "killed", examples, **case), whole)
    limit = whole[0][-1]["micro_batch_tokens"]
    small, _ = train(tmp_path / "small", examples, adapter=DROPOUT, limit=limit)
    assert [line["loss"] for line in whole[0]] == [line["loss"] for line in small]


class NoRoom:
    """Graphs whose first passes find no memory."""

    recording = False

    def __init__(self, shapes, *, way, loss, weights, device):
        self.shapes, self.way, self.weights = shapes, way, weights

    def capture(self):
        for weight in self.weights:
            weight.grad = torch.ones_like(weight)
        raise torch.OutOfMemoryError("out of memory")

    def abandon(self):
        for weight in self.weights:
            weight.grad = None


def test_where_there_is_no_memory_for_graphs_steps_are_eager(examples, tmp_path, monkeypatch, caplog):
    whole, _ = train(tmp_path / "whole", examples, adapter=LORA)
    monkeypatch.setattr(gradients.Gradients, "_unrecordable", lambda _: "")
    monkeypatch.setattr(gradients, "quickest", lambda *_, **__: "graph")
    monkeypatch.setattr(gradients, "Graphs", NoRoom)
    found, _ = train(tmp_path / "found", examples, adapter=LORA)
    assert [line["loss"] for line in found] == [line["loss"] for line in whole]
    assert {line["way"] for line in found} == {"eager"}
    assert "no memory to record steps" in caplog.text
    monkeypatch.setattr(NoRoom, "recording", True)  # too late
    with pytest.raises(RuntimeError, match=r"launch\.step=eager needs none"):
        train(tmp_path / "late", examples, adapter=LORA)


def test_steps_are_prepared_only_where_some_are_left(examples, tmp_path, monkeypatch):
    asked = []
    found = gradients.Gradients.recorded
    monkeypatch.setattr(
        gradients.Gradients, "recorded", lambda self, *given, **how: asked.append(how) or found(self, *given, **how)
    )
    train(tmp_path, examples, adapter=LORA, minutes=0)
    assert asked == [{"asked": "auto", "alike": 1}]
    train(tmp_path, examples, adapter=LORA, minutes=0)
    assert len(asked) == 1


def test_a_row_that_does_not_fit_alone_is_named_by_its_size(examples, tmp_path):
    with pytest.raises(torch.OutOfMemoryError, match=r"one row of \d\d tokens does not fit .* method.quantize=nf4"):
        train(tmp_path, examples, adapter=LORA, room=12)


def test_a_step_without_a_number_is_skipped_and_said(examples, tmp_path):
    found, weights = train(tmp_path, examples, adapter=ADALORA, broken=(3, 5, 6))
    assert [line["step"] for line in found if "skipped" in line] == [3, 5, 6]
    assert all((line["loss"] is None) == ("skipped" in line) for line in found)
    assert [line["lr"] for line in found] == [
        line["lr"] for line in train(tmp_path / "whole", examples, adapter=ADALORA)[0]
    ]
    assert all(torch.isfinite(tensor).all() for tensor in weights.values())


def test_the_third_in_a_row_names_step_rows_and_learning_rate(examples, tmp_path):
    with pytest.raises(
        FloatingPointError, match=r"step 6: loss nan, .* learning rate 0.00\d+, rows r\d+, r\d+"
    ) as error:
        train(tmp_path, examples, adapter=LORA, broken=(4, 5, 6))
    assert "steps 4 to 6" in str(error.value)
    with pytest.raises(FloatingPointError, match="step 6"):  # it goes on from step 5, and counts as before
        train(tmp_path, examples, adapter=LORA, broken=(4, 5, 6))


def test_a_disk_that_is_too_small_is_refused_before_training(monkeypatch, tmp_path):
    model = torch.nn.Linear(1000, 1000)
    refuse_small_disk(tmp_path, model)
    real = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: real._replace(free=30_000_000))
    with pytest.raises(OSError, match=r"needs 39 MiB .* 29 MiB are free"):
        refuse_small_disk(tmp_path, model)
