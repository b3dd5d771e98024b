"""RMSNorm as one operation is RMSNorm, and nothing else becomes one."""

import copy

import pytest
import torch
import transformers
from conftest import PACKED, tiny_base

from finetune.models.norms import fused


def norms(model):
    return [module for module in model.modules() if type(module).__name__.endswith("RMSNorm")]


def varied(architecture):
    model = tiny_base(architecture)
    for norm in norms(model):
        torch.nn.init.normal_(norm.weight, std=0.5)
    return model


@pytest.mark.parametrize("architecture", PACKED)
def test_losses_and_gradients_are_the_same(architecture):
    model, ids = varied(architecture), torch.randint(3, 96, (3, 11), generator=torch.Generator().manual_seed(0))
    model(input_ids=ids, labels=ids).loss.backward()
    expected = {name: weight.grad.clone() for name, weight in model.named_parameters()}
    model.zero_grad()
    with fused(model):
        assert len([norm for norm in norms(model) if "forward" in vars(norm)]) == 5
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


class LateRMSNorm(torch.nn.Module):
    """Adds eps to the root."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(32))
        self.variance_epsilon = 1e-6

    def forward(self, x):
        return self.weight * x / (x.square().mean(-1, keepdim=True).sqrt() + self.variance_epsilon)


def test_an_eps_in_another_place_is_seen():
    norm = LateRMSNorm()
    with fused(norm):
        assert "forward" not in vars(norm)


def test_within_itself_it_does_nothing_and_behind_it_nothing_is_left():
    model = varied("llama")
    with fused(model):
        within = [norm.forward for norm in norms(model)]
        with fused(model):
            pass
        assert [norm.forward for norm in norms(model)] == within
        clone = copy.deepcopy(model)
        assert all(norm.forward.__self__ is norm for norm in norms(clone))
    assert not any("forward" in vars(module) for module in model.modules())
