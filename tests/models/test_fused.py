"""Norms and rotary positions in few operations are what they were, and other formulas are left alone."""

import copy
import sys

import pytest
import torch
import transformers
from conftest import ARCHITECTURES, PACKED, tiny_base

from finetune.models.fused import ROTARY, fused


def norms(model):
    return [module for module in model.modules() if type(module).__name__.endswith("RMSNorm")]


def rotary(model):
    """The function that turns queries and keys, where the model's file has one."""
    return getattr(sys.modules[type(model).__module__], ROTARY, None)


def varied(architecture):
    model = tiny_base(architecture)
    for norm in norms(model):
        torch.nn.init.normal_(norm.weight, std=0.5)
    return model


@pytest.mark.parametrize("checkpointed", [False, True], ids=["plain", "checkpointed"])
@pytest.mark.parametrize("architecture", PACKED)
def test_losses_and_gradients_are_the_same(architecture, checkpointed):
    model, ids = varied(architecture), torch.randint(3, 96, (3, 11), generator=torch.Generator().manual_seed(0))
    model(input_ids=ids, labels=ids).loss.backward()
    expected = {name: weight.grad.clone() for name, weight in model.named_parameters()}
    model.zero_grad()
    if checkpointed:
        model.train().gradient_checkpointing_enable({"use_reentrant": False})
    with fused(model):
        assert len([norm for norm in norms(model) if "forward" in vars(norm)]) == 5
        ours = rotary(model).__module__ == fused.__module__
        assert ours is (architecture != "glm")  # turns neighbours, and half of a head
        model(input_ids=ids, labels=ids).loss.backward()
    for name, weight in model.named_parameters():
        torch.testing.assert_close(weight.grad, expected[name], rtol=1e-5, atol=1e-6, msg=name)


def test_in_bfloat16_it_is_nearer_to_float32():
    norm = norms(varied("qwen2").bfloat16())[0]
    x = torch.randn(64, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    exact = copy.deepcopy(norm).float()(x.float())
    before = (norm(x).float() - exact).abs().mean()
    with fused(norm):
        found = norm(x)
    assert found.dtype == torch.bfloat16
    assert (found.float() - exact).abs().mean() < 0.8 * before


def test_a_state_in_another_precision_is_left_to_the_layer():
    norm = norms(varied("qwen2").bfloat16())[0]
    x = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    expected = norm(x)
    with fused(norm):
        found = norm(x)
    assert found.dtype == expected.dtype
    assert torch.equal(found, expected)


def test_another_formula_is_left_alone():
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = transformers.GemmaConfig(vocab_size=96, intermediate_size=64, head_dim=8, **shape)
    model = transformers.AutoModelForCausalLM.from_config(config)  # scales by 1 + w
    assert len(norms(model)) == 3
    with fused(model):
        assert not any("forward" in vars(norm) for norm in norms(model))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_queries_and_keys_are_turned_as_the_base_turns_them(dtype):
    model = tiny_base("qwen2")
    draw = torch.Generator().manual_seed(0)
    q, k, cos, sin = (
        torch.randn(*shape, generator=draw) for shape in ((2, 5, 4, 8), (2, 5, 2, 8), (2, 5, 8), (2, 5, 8))
    )
    weights = [torch.randn(2, heads, 5, 8, generator=draw).double() for heads in (4, 2)]

    def turned(dtype, function):
        """Both, and the gradients of their products with random weights."""
        parts = [x.to(dtype).transpose(1, 2).requires_grad_() for x in (q, k)]
        found = function(*parts, cos.to(dtype), sin.to(dtype))
        loss = sum((x.double() * w).sum() for x, w in zip(found, weights, strict=True))
        return [x.detach() for x in (*found, *torch.autograd.grad(loss, parts))]

    exact = turned(torch.float64, rotary(model))
    before = turned(dtype, rotary(model))
    with fused(model):
        found = turned(dtype, rotary(model))
    for new, old, true in zip(found, before, exact, strict=True):
        assert new.dtype == dtype
        error, allowed = (float((x.double() - true).norm() / true.norm()) for x in (new, old))
        assert error <= max(allowed, 1e-12)


def test_a_part_of_a_head_is_turned_by_the_base_itself():
    config = transformers.Phi3Config(
        vocab_size=96, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, pad_token_id=0,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
    )  # fmt: skip
    model, ids = transformers.AutoModelForCausalLM.from_config(config).eval(), torch.arange(3, 40)[None]
    expected = model(input_ids=ids).logits
    with fused(model):
        assert rotary(model).__module__ == fused.__module__
        torch.testing.assert_close(model(input_ids=ids).logits, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_generations_are_the_same(architecture):
    model, ids = varied(architecture), torch.randint(3, 96, (3, 11), generator=torch.Generator().manual_seed(0))
    expected = model.generate(input_ids=ids, max_new_tokens=8, do_sample=False)
    with fused(model):
        assert torch.equal(model.generate(input_ids=ids, max_new_tokens=8, do_sample=False), expected)


class LateRMSNorm(torch.nn.Module):
    """Adds eps to the root."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(32))
        self.variance_epsilon = 1e-6

    def forward(self, x):
        return self.weight * x / (x.square().mean(-1, keepdim=True).sqrt() + self.variance_epsilon)


class ShiftedRMSNorm(LateRMSNorm):
    """Scales by 1 + w."""

    def forward(self, x):
        return (1 + self.weight) * x * (x.square().mean(-1, keepdim=True) + self.variance_epsilon).rsqrt()


class GatedRMSNorm(LateRMSNorm):
    """Starts as the norm that it will not stay."""

    def __init__(self):
        super().__init__()
        self.gate = torch.nn.Parameter(torch.zeros(32))

    def forward(self, x):
        return (1 + self.gate) * self.weight * x * (x.square().mean(-1, keepdim=True) + self.variance_epsilon).rsqrt()


@pytest.mark.parametrize("kind", [LateRMSNorm, ShiftedRMSNorm, GatedRMSNorm])
def test_a_norm_of_another_formula_is_seen(kind):
    norm = kind()
    with fused(norm):
        assert "forward" not in vars(norm)


def _none_of_k(q, k=None, cos=None, sin=None, unsqueeze_dim=1):
    return ORIGINAL(q, k, cos, sin, unsqueeze_dim)


def _more(q, k, cos, sin, position_ids=None, unsqueeze_dim=1):
    return ORIGINAL(q, k, cos, sin, unsqueeze_dim)


def _one(q, k, cos, sin, unsqueeze_dim=1):
    return ORIGINAL(q, k, cos, sin, unsqueeze_dim)[:1]


def _single(q, k, cos, sin, unsqueeze_dim=1):
    return [x.float() for x in ORIGINAL(q, k, cos, sin, unsqueeze_dim)]


ORIGINAL = transformers.models.qwen2.modeling_qwen2.apply_rotary_pos_emb


@pytest.mark.parametrize("function", [_none_of_k, _more, _one, _single])
def test_rotary_functions_of_another_form_are_left_alone(function, monkeypatch):
    model = tiny_base("qwen2")
    monkeypatch.setattr(function, "__module__", type(model).__module__)
    monkeypatch.setattr(sys.modules[type(model).__module__], ROTARY, function)
    with fused(model):
        assert rotary(model) is function


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_under_autocast_on_a_gpu_a_norm_keeps_its_precision():
    model = varied("qwen2").bfloat16().cuda()
    x = torch.randn(4, 32, generator=torch.Generator().manual_seed(0)).bfloat16().cuda()
    norm = norms(model)[0]
    with torch.autocast("cuda", torch.bfloat16), fused(model):
        assert "forward" in vars(norm)
        found = norm(x.requires_grad_())
    assert found.dtype == torch.bfloat16
    assert "FusedRmsNorm" in str(found.grad_fn)


def test_within_itself_it_does_nothing_and_behind_it_nothing_is_left():
    model = varied("llama")
    before = rotary(model)
    with fused(model):
        within = [norm.forward for norm in norms(model)], rotary(model)
        with fused(model):
            pass
        assert ([norm.forward for norm in norms(model)], rotary(model)) == within
        clone = copy.deepcopy(model)
        assert all(norm.forward.__self__ is norm for norm in norms(clone))
    assert not any("forward" in vars(module) for module in model.modules())
    assert rotary(model) is before
