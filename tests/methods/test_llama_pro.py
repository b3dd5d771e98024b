import pytest
import torch
from conftest import ARCHITECTURES, tiny_base
from grid import attach, logits, stored_base
from torch import nn

from finetune.methods.blocks import blocks
from finetune.methods.llama_pro import LlamaPro
from finetune.methods.method import trainable

IDS = torch.tensor([[5, 9, 33, 70, 4, 61, 8, 20]])


def moved(model):
    """The model with copies that are no longer the identity."""
    generator = torch.Generator().manual_seed(2)
    for parameter in trainable(model):
        parameter.data.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.mark.parametrize(
    ("num_blocks", "every", "copies"),
    [(2, 1, [1, 3]), (2, 4, [2]), (5, 2, [2, 5, 7]), (8, 4, [4, 9])],
    ids=["each", "small base", "last group smaller", "as in the paper"],
)
def test_a_copy_follows_every_group(num_blocks, every, copies):
    base = tiny_base("qwen2")
    while len(base.model.layers) < num_blocks:
        base.model.layers.append(type(base.model.layers[0])(base.config, len(base.model.layers) % 2))
    base.config.num_hidden_layers = num_blocks
    base.config.layer_types = ["full_attention"] * num_blocks
    model = attach(LlamaPro(every=every), base)
    trained = [n for n, block in enumerate(blocks(model)) if any(p.requires_grad for p in block.parameters())]
    assert trained == copies
    assert model.config.num_hidden_layers == len(model.config.layer_types) == num_blocks + len(copies)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_block_has_its_own_place_in_the_cache(architecture):
    model = moved(attach(LlamaPro(every=1), tiny_base(architecture)))
    found = [m.layer_idx for m in model.modules() if hasattr(m, "layer_idx")]
    assert found == list(range(4))
    whole = logits(model, IDS)
    with torch.no_grad():
        first = model(IDS[:, :5], use_cache=True)
        assert [first.past_key_values.get_seq_length(n) for n in range(4)] == [5] * 4
        rest = model(IDS[:, 5:], past_key_values=first.past_key_values, use_cache=True).logits
    torch.testing.assert_close(torch.cat([first.logits, rest], dim=1), whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_copy_has_the_weights_of_its_block_but_for_the_output_projections(architecture):
    model = attach(LlamaPro(every=1), tiny_base(architecture))
    block, twin = blocks(model)[:2]
    zero = ("o_proj", "down_proj", "self_attention.dense", "dense_4h_to_h")
    for (name, weight), copied in zip(block.named_parameters(), twin.parameters(), strict=True):
        assert not copied.any() if any(part in name for part in zero) else torch.equal(copied, weight), name
        assert copied.data_ptr() != weight.data_ptr()


@pytest.mark.parametrize("quantize", ["nf4", "int8"])
@pytest.mark.parametrize("architecture", ["qwen2", "bloom"])
def test_copies_of_quantized_blocks_are_in_full_precision(architecture, quantize, tmp_path):
    base = stored_base(architecture, quantize=quantize, folder=tmp_path)
    before = logits(base, IDS)
    model = attach(LlamaPro(every=1), base)
    torch.testing.assert_close(logits(model, IDS), before)
    quantized, copied = ([m for m in block.modules() if isinstance(m, nn.Linear)] for block in blocks(model)[:2])
    assert {type(m) for m in copied} == {nn.Linear}
    assert {p.dtype for p in trainable(model)} == {torch.float32}
    for layer, copy in zip(quantized, copied, strict=True):
        if copy.weight.any():  # not an output projection
            hidden = torch.randn(3, layer.in_features, generator=torch.Generator().manual_seed(0))
            # int8 rounds its input too
            torch.testing.assert_close(copy(hidden), layer(hidden), rtol=0, atol=1e-5 if quantize == "nf4" else 0.05)


def test_blocks_that_cannot_be_the_identity_are_refused():
    base = tiny_base("bloom")
    base.config.apply_residual_connection_post_layernorm = True
    with pytest.raises(ValueError, match="identity"):
        attach(LlamaPro(every=1), base)


def test_every_is_at_least_one():
    with pytest.raises(ValueError, match="every=0"):
        LlamaPro(every=0)
