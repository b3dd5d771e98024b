"""LoRA in few operations gives what PEFT's own forward pass gives, and leaves nothing behind."""

import contextlib
from functools import partial, partialmethod

import pytest
import torch
import transformers
from accelerate import Accelerator
from conftest import ARCHITECTURES, PACKED
from grid import attach, config, make, stored_base, varied_base
from peft import LoraConfig
from torch._dynamo.utils import counters

from finetune.data.batches import pack, pad
from finetune.feeder import Feeder, summed_loss
from finetune.graphs import compiled
from finetune.loop import Loop
from finetune.methods.method import trainable
from finetune.methods.peft import Peft
from finetune.models.attention import packing
from finetune.models.head import _compiled
from finetune.models.lean import lean
from finetune.noise import noisy

CASES = [
    (architecture, packed, checkpointed)
    for architecture in ARCHITECTURES
    for packed in (False, True)
    for checkpointed in (False, True)
    if architecture in PACKED or not packed
]
OPTIM = {
    "optimizer": {"_target_": "torch.optim.AdamW", "weight_decay": 0.01},
    **{"schedule": "linear", "warmup": 0.1, "accumulation": 2, "max_grad_norm": 1.0, "loss_on": "target"},
    **{"validations": 3, "neftune_alpha": 5.0},
}


def tuned(method, architecture, *, base=None):
    """A model whose factors are not 0, and whose layers differ."""
    model = attach(method, base or varied_base(architecture)).train()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for weight in trainable(model):
            weight.copy_(0.2 * torch.randn(weight.shape, generator=generator))
    return model


def lora(**changes):
    arguments = {"r": 4, "lora_alpha": 6, "target_modules": config("lora", "qwen2")["model"]["linear"], **changes}
    return Peft(LoraConfig(task_type="CAUSAL_LM", **arguments))


def gradients(model, batch, *, within=contextlib.nullcontext, alpha=None, passes=1):
    """Loss of the last pass; gradients of all of them."""
    model.zero_grad()
    torch.manual_seed(7)
    with within(model):
        for _ in range(passes):
            attention = contextlib.nullcontext() if batch.bounds is None else packing(model.get_base_model())
            with attention, noisy(model, batch, alpha=alpha):
                loss = summed_loss(model, batch)
                loss.backward()
    return loss.item(), {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}


def error(found, expected):
    """The largest relative difference of a gradient."""
    assert found.keys() == expected.keys()
    return max(float((found[n] - g).norm() / g.norm()) for n, g in expected.items())


def num_lean(model):
    return sum("lean" in vars(module) for module in model.modules())


@pytest.mark.parametrize(
    ("architecture", "packed", "checkpointed"),
    CASES,
    ids=[f"{a}-{'packed' if p else 'padded'}{'-checkpointed' if c else ''}" for a, p, c in CASES],
)
def test_loss_and_gradients_are_pefts(architecture, packed, checkpointed, examples):
    model = tuned(make("lora", architecture), architecture)
    batch = pack(examples) if packed else pad(examples, pad_id=0)
    if checkpointed:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    loss, expected = gradients(model, batch, alpha=5.0, passes=2)
    again, found = gradients(model, batch, alpha=5.0, passes=2, within=lean)
    assert again == pytest.approx(loss, rel=1e-6)
    assert error(found, expected) < 1e-5  # of sums in another order: PEFT's own rows in another order differ as much
    assert all(gradient.dtype == torch.float32 for gradient in found.values())


@pytest.mark.parametrize(
    ("method", "together"),
    [
        (lora(), 7),
        (lora(use_rslora=True), 7),
        (lora(init_lora_weights="pissa"), 7),
        (lora(target_modules=["q_proj", "v_proj", "down_proj"]), 3),
        (lora(rank_pattern={"k_proj": 2, "0.mlp.up_proj": 3}, alpha_pattern={"v_proj": 5}), 7),
        (lora(lora_dropout=0.3), 7),
        (make("lora_plus", "qwen2"), 7),
        (lora(use_dora=True), 0),
        (lora(lora_bias=True, target_modules=["q_proj"]), 0),
        (lora(init_lora_weights="mica"), 0),
        (lora(target_modules=["q_proj"], modules_to_save=["lm_head"]), 1),
        *((make(name, "qwen2"), 0) for name in ("adalora", "kasa", "velora", "bdlora", "delta_lora", "prompt")),
    ],
    ids=lambda case: case.__class__.__name__ if not isinstance(case, int) else str(case),
)
def test_what_is_more_than_lora_stays_pefts(method, together, examples):
    model = tuned(method, "qwen2")
    batch = pad(examples, pad_id=0)
    loss, expected = gradients(model, batch)
    with method.lean(model):
        assert num_lean(model) == 2 * together
    again, found = gradients(model, batch, within=method.lean)
    assert again == pytest.approx(loss, rel=1e-6)
    assert error(found, expected) < 1e-5


@pytest.mark.parametrize(("rank", "fits"), [(8, True), (32, True), (4, True), (40, False)])
def test_b_stands_beside_a_wide_weight_and_a_below_a_tall_one(rank, fits, examples):
    model = tuned(lora(r=rank), "qwen2")
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    expected = gradients(model, pad(examples, pad_id=0))
    with lean(model):
        found = gradients(model, pad(examples, pad_id=0))
        block = model.get_base_model().model.layers[1]
        gate, down, out = (
            layer.lean[0] for layer in (block.mlp.gate_proj, block.mlp.down_proj, block.self_attn.o_proj)
        )
        assert out.room is None
        assert (down.room is not None) == (rank % 8 == 0)
        assert (gate.room is not None) == fits  # of two layers
        if gate.room is not None:
            assert torch.equal(gate.room[:, 32 : 32 + 2 * rank], gate.b)
        if down.room is not None:
            assert torch.equal(down.room[32 : 32 + rank], down.a)
    assert found[0] == pytest.approx(expected[0], rel=1e-6)
    assert error(found[1], expected[1]) < 1e-5
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


@pytest.mark.parametrize("quantize", ["nf4", "int8"])
def test_a_quantised_base_keeps_its_own_products(quantize, examples, tmp_path):
    model = tuned(lora(), "qwen2", base=stored_base("qwen2", quantize=quantize, folder=tmp_path))
    batch = pad(examples, pad_id=0)
    loss, expected = gradients(model, batch)
    again, found = gradients(model, batch, within=lean)
    assert again == pytest.approx(loss, rel=1e-6)
    assert error(found, expected) < 1e-5


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_in_half_precision_it_is_as_near_to_float32_as_peft(architecture, examples):
    model = tuned(make("lora", architecture), architecture)
    batch = pad(examples, pad_id=0)
    _, exact = gradients(model, batch)
    for weight in (p for p in model.parameters() if not p.requires_grad):
        weight.data = weight.data.bfloat16()
    _, exact = gradients(model.float(), batch)  # of the rounded base
    for weight in (p for p in model.parameters() if not p.requires_grad):
        weight.data = weight.data.bfloat16()

    def distance(within):
        with torch.autocast("cpu", torch.bfloat16):
            _, found = gradients(model, batch, within=within)
        assert all(gradient.dtype == torch.float32 for gradient in found.values())
        return sum(float((found[n] - g).norm() / g.norm()) for n, g in exact.items()) / len(exact)

    assert 0 < distance(lean) < 1.1 * distance(contextlib.nullcontext)


def test_a_coarse_base_without_autocast_is_left_to_peft(examples):
    model = tuned(lora(), "qwen2")
    for weight in (p for p in model.parameters() if not p.requires_grad):
        weight.data = weight.data.bfloat16()
    _, expected = gradients(model, pad(examples, pad_id=0))
    _, found = gradients(model, pad(examples, pad_id=0), within=lean)
    assert all(torch.equal(found[n], g) for n, g in expected.items())


def test_afterwards_everything_is_as_before(examples, tmp_path):
    method = lora()
    model = tuned(method, "qwen2")
    batch = pad(examples, pad_id=0)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    addresses = dict(model.named_parameters())
    loss, expected = gradients(model, batch)
    method.save(model, tmp_path / "before")
    with lean(model):
        gradients(model, batch)
        method.save(model, tmp_path / "within")
        assert model.state_dict().keys() == before.keys()
    method.save(model, tmp_path / "after")
    again, found = gradients(model, batch)
    assert again == loss
    assert all(torch.equal(found[n], g) for n, g in expected.items())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(p is addresses[name] for name, p in model.named_parameters())
    assert not num_lean(model)
    assert not any("forward" in vars(module) for module in model.modules())
    names = ("before", "within", "after")
    assert len({(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in names}) == 1


def test_siblings_that_get_other_inputs_compute_alone():
    model = tuned(lora(), "qwen2")
    attention = model.get_base_model().model.layers[0].self_attn
    x, y = torch.randn(1, 3, 32), torch.randn(1, 3, 32)
    calls = [("k_proj", x), ("q_proj", x), ("k_proj", y), ("v_proj", x), ("v_proj", y), ("q_proj", y), ("v_proj", y)]
    expected = [getattr(attention, name)(tensor) for name, tensor in calls]
    with lean(model):
        model(torch.tensor([[3]]))  # casts
        found = [getattr(attention, name)(tensor) for name, tensor in calls]
        with model.disable_adapter():
            alone = attention.k_proj(x)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(alone, attention.k_proj.base_layer(x))


@pytest.mark.parametrize("checkpointed", [False, True], ids=["plain", "checkpointed"])
def test_compiled_blocks_are_one_kind(checkpointed, examples, monkeypatch):
    how = {"backend": "aot_eager", "fullgraph": True}
    monkeypatch.setattr(torch, "compile", partial(torch.compile, **how))
    _compiled.cache_clear()
    monkeypatch.setattr(torch.nn.Module, "compile", partialmethod(torch.nn.Module.compile, **how))
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 64}
    deeper = transformers.Qwen2Config(vocab_size=96, num_hidden_layers=4, **sizes)
    model = tuned(lora(), "qwen2", base=transformers.AutoModelForCausalLM.from_config(deeper))
    batch = pad(examples, pad_id=0)
    if checkpointed:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    loss, expected = gradients(model, batch)
    torch._dynamo.reset()
    counters.clear()
    layers = model.get_base_model().model.layers
    with lean(model), compiled(layers, model.get_input_embeddings()):
        for _ in range(2):
            again, found = gradients(model, batch)
    assert counters["stats"]["unique_graphs"] == 2  # and the loss
    _compiled.cache_clear()
    assert again == pytest.approx(loss, rel=1e-6)
    assert error(found, expected) < 1e-5


def trained(examples, method, *, steps=20):
    accelerator = Accelerator(cpu=True)
    feeder = Feeder(packed=True, pad_id=0, loss_on="target", device=accelerator.device)
    plan = [list(range(i % 3, len(examples), 2)) for i in range(steps)]
    loop, lines = Loop(method, accelerator, feeder, examples, plan, OPTIM, 1e-3), []
    torch.manual_seed(2)
    model = attach(method, varied_base("qwen2"))
    model = loop.run(model, validate=lambda m: summed_loss(m, pad(examples, pad_id=0)).item(), record=lines.append)
    return {n: p.detach() for n, p in model.named_parameters()}, [line["loss"] for line in lines]


def test_twenty_steps_end_where_pefts_end(examples, monkeypatch):
    found, losses = trained(examples, lora())
    method = lora()
    monkeypatch.setattr(method, "lean", lambda _: contextlib.nullcontext())
    expected, others = trained(examples, method)
    assert losses == pytest.approx(others, rel=1e-5)
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, rtol=1e-5, atol=1e-5, msg=name)
