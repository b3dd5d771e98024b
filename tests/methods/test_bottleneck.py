import inspect

import pytest
import torch
from conftest import ARCHITECTURES, tiny_base
from exactness import assert_learns
from grid import attach, logits, stored_base

from finetune.data.batches import pad
from finetune.methods.blocks import attention, blocks, feed_forward
from finetune.methods.bottleneck import Adapter
from finetune.methods.build import build
from finetune.methods.method import trainable

BOTH = ["attention", "feed_forward"]


def method(**changes):
    return Adapter(**({"size": 8, "places": BOTH, "activation": "gelu"} | changes))


def randomised(model):
    generator = torch.Generator().manual_seed(2)
    for parameter in trainable(model):
        parameter.data.normal_(std=0.3, generator=generator)
    return model


def call(sublayer, hidden, residual):
    """A feed-forward's output; BLOOM's takes the residual and adds it."""
    return (
        sublayer(hidden, residual)
        if "residual" in inspect.signature(sublayer.forward).parameters
        else (residual + sublayer(hidden))
    )


def added(adapter, hidden):
    """The paper's equation, by hand."""
    inner = torch.nn.functional.gelu(hidden @ adapter.down.weight.T + adapter.down.bias)
    return inner @ adapter.up.weight.T + adapter.up.bias


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_after_the_feed_forward_it_sees_the_output_without_the_residual(architecture):
    plain = feed_forward(blocks(tiny_base(architecture))[0])
    tuned = feed_forward(blocks(randomised(attach(method(), tiny_base(architecture))))[0])
    adapter = next(m.adapter for m in tuned.modules() if hasattr(m, "adapter"))
    hidden, residual = torch.randn(2, 1, 5, 32, generator=torch.Generator().manual_seed(3))
    output = call(plain, hidden, torch.zeros_like(hidden))
    expected = residual + output + added(adapter, output)
    torch.testing.assert_close(call(tuned, hidden, residual), expected)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_after_attention_it_sees_the_projected_heads(architecture):
    tuned = attention(blocks(randomised(attach(method(), tiny_base(architecture))))[0])
    projection = tuned.dense if architecture == "bloom" else tuned.o_proj
    heads = torch.randn(1, 5, 32, generator=torch.Generator().manual_seed(3))
    output = torch.nn.functional.linear(heads, projection.weight, projection.bias)
    torch.testing.assert_close(projection(heads), output + added(projection.adapter, output))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_in_parallel_it_sees_the_input_and_is_scaled(architecture):
    plain = feed_forward(blocks(tiny_base(architecture))[0])
    parallel = method(places=["feed_forward"], parallel=True, scale=4.0)
    tuned = feed_forward(blocks(randomised(attach(parallel, tiny_base(architecture))))[0])
    hidden, residual = torch.randn(2, 1, 5, 32, generator=torch.Generator().manual_seed(3))
    expected = call(plain, hidden, residual) + 4 * added(tuned.adapter, hidden)
    torch.testing.assert_close(call(tuned, hidden, residual), expected)


@pytest.mark.parametrize("quantize", ["nf4", "int8"])
@pytest.mark.parametrize("architecture", ["qwen2", "bloom"])
def test_learns_on_a_quantized_base(architecture, quantize, tmp_path, examples):
    base = stored_base(architecture, quantize=quantize, folder=tmp_path)
    ids = pad(examples, pad_id=0).ids
    before = logits(base, ids)
    model = attach(method(), base)
    torch.testing.assert_close(logits(model, ids), before)
    assert_learns(model, examples, lr=1e-2)


def test_adapters_stay_in_float32_in_a_half_precision_base(examples):
    model = randomised(attach(method(), tiny_base("qwen2").bfloat16()))
    assert {p.dtype for p in trainable(model)} == {torch.float32}
    assert logits(model, pad(examples, pad_id=0).ids).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"size": 0}, "size=0"),
        ({"places": []}, "attention, feed_forward"),
        ({"places": ["head"]}, "attention, feed_forward"),
        ({"activation": "swosh"}, "swosh"),
        ({"parallel": True}, "beside the feed-forward only"),
        ({"width": 8}, "width"),
    ],
)
def test_refuses(changes, said):
    arguments = {"size": 8, "places": BOTH, "activation": "gelu"} | changes
    with pytest.raises(ValueError, match=said):
        build({"name": "adapter", "adapter": {"_target_": "finetune.methods.bottleneck.Adapter", **arguments}})


def test_a_base_that_bypasses_its_projections_is_refused():
    base = tiny_base("bloom")
    base.transformer.h[0].mlp.pretraining_tp, base.transformer.h[0].mlp.slow_but_exact = 2, True
    with pytest.raises(ValueError, match="slow_but_exact"):
        attach(method(), base)


def test_weights_of_another_shape_of_method_are_refused(tmp_path):
    method().save(attach(method(), tiny_base("qwen2")), tmp_path)
    with pytest.raises(ValueError, match="another method or base"):
        method(places=["feed_forward"]).load(tiny_base("qwen2"), tmp_path)
