import json

import pytest
import torch
from conftest import ARCHITECTURES, tiny_base
from grid import attach, logits, stored_base
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer

from finetune.data.batches import pad
from finetune.feeder import summed_loss
from finetune.methods.delta_lora import DeltaLora
from finetune.methods.method import trainable

NUM_STEPS, RATIO, R, ALPHA = 12, 0.5, 4, 8
TARGETS = {name: ["q_proj", "v_proj", "down_proj"] for name in ARCHITECTURES} | {"bloom": ["query_key_value", "dense"]}


def method(architecture="qwen2", **changes):
    arguments = {"r": R, "lora_alpha": ALPHA, "update_ratio": RATIO, "warmup": 0.25}
    return DeltaLora(**(arguments | {"target_modules": TARGETS[architecture]} | changes))


def train(model, examples, *, after_step, steps=range(1, NUM_STEPS + 1)):
    """Losses of plain gradient steps."""
    model.train()
    optimizer = torch.optim.SGD(trainable(model), lr=0.5)
    losses = []
    for step in steps:
        optimizer.zero_grad()
        loss = summed_loss(model, pad(examples, pad_id=0)) / 100
        loss.backward()
        optimizer.step()
        after_step(model, step)
        losses.append(loss.item())
    return losses


def products(model):
    """B A of every layer."""
    layers = [m for m in model.modules() if isinstance(m, LoraLayer)]
    return [(m, (m.lora_B["default"].weight @ m.lora_A["default"].weight).detach()) for m in layers]


def step_by_step(architecture, examples, *, start):
    """The paper's algorithm: after step `start`, W moves by ratio * s * (the product's change) at every step."""
    base = tiny_base(architecture).double()
    torch.manual_seed(1)
    lora = LoraConfig(task_type="CAUSAL_LM", r=R, lora_alpha=ALPHA, target_modules=TARGETS[architecture])
    model = get_peft_model(base, lora).double()
    before = [product for _, product in products(model)]

    def move(model, step):
        for n, (layer, product) in enumerate(products(model)):
            if step > start:
                layer.base_layer.weight.data += RATIO * (ALPHA / R) * (product - before[n])
            before[n] = product

    return model, train(model, examples, after_step=move)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("warmup", [0.0, 0.25], ids=["from the start", "after a warm-up"])
def test_equals_the_step_by_step_update_in_float64(architecture, warmup, examples):
    reference, expected = step_by_step(architecture, examples, start=round(warmup * NUM_STEPS))
    tuned = method(architecture, warmup=warmup)
    model = attach(tuned, tiny_base(architecture).double(), num_steps=NUM_STEPS).double()
    losses = train(model, examples, after_step=tuned.after_step)
    assert losses == pytest.approx(expected, rel=1e-10)
    ids = pad(examples, pad_id=0).ids
    torch.testing.assert_close(logits(model, ids), logits(reference, ids), rtol=1e-9, atol=1e-10)
    plain = attach(method(architecture, update_ratio=0.0), tiny_base(architecture).double()).double()
    assert train(plain, examples, after_step=lambda *_: None)[-1] != pytest.approx(expected[-1], rel=1e-6)


def test_is_saved_as_a_lora_of_twice_the_rank_that_peft_loads(tmp_path, examples):
    tuned = method()
    model = attach(tuned, tiny_base("qwen2"), num_steps=NUM_STEPS)
    train(model, examples, after_step=tuned.after_step)
    tuned.save(model, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["r"] == 2 * R
    loaded = PeftModel.from_pretrained(tiny_base("qwen2"), tmp_path)
    ids = pad(examples, pad_id=0).ids
    torch.testing.assert_close(logits(loaded, ids), logits(model, ids), rtol=1e-4, atol=1e-6)


def test_saved_before_the_warm_up_ends_it_is_lora(tmp_path, examples):
    tuned = method()
    model = attach(tuned, tiny_base("qwen2"), num_steps=NUM_STEPS)
    train(model, examples, after_step=tuned.after_step, steps=[1, 2])
    assert tuned.state() == {}
    tuned.save(model, tmp_path)
    ids = pad(examples, pad_id=0).ids
    loaded = tuned.load(tiny_base("qwen2"), tmp_path)
    torch.testing.assert_close(logits(loaded, ids), logits(model, ids), rtol=1e-4, atol=1e-6)


def test_resumes_with_the_factors_of_step_k(examples):
    whole, model = method(), tiny_base("qwen2")
    model = attach(whole, model, num_steps=NUM_STEPS)
    losses = train(model, examples, after_step=whole.after_step, steps=range(1, 7))
    weights, state = {n: p.detach().clone() for n, p in model.named_parameters()}, whole.state()
    losses = train(model, examples, after_step=whole.after_step, steps=range(7, 13))
    again = method()
    resumed = attach(again, tiny_base("qwen2"), num_steps=NUM_STEPS)
    resumed.load_state_dict(weights)
    again.restore(state)
    assert train(resumed, examples, after_step=again.after_step, steps=range(7, 13)) == pytest.approx(losses, rel=1e-6)


@pytest.mark.parametrize("quantize", ["nf4", "int8"])
def test_a_quantized_matrix_stays_as_it_is(quantize, tmp_path, examples):
    base = stored_base("qwen2", quantize=quantize, folder=tmp_path)
    before = [p.detach().clone() for p in base.parameters()]
    frozen = list(base.parameters())
    tuned = method()
    model = attach(tuned, base, num_steps=NUM_STEPS)
    losses = train(model, examples, after_step=tuned.after_step)
    assert losses[-1] < losses[0]
    assert tuned.state()
    assert all(torch.equal(now, then) for now, then in zip(frozen, before, strict=True))


@pytest.mark.parametrize(
    ("changes", "said"), [({"warmup": 1.0}, "share of the steps"), ({"lora_dropout": 0.1}, "lora_dropout")]
)
def test_refuses(changes, said):
    with pytest.raises((ValueError, TypeError), match=said):
        method(**changes)
