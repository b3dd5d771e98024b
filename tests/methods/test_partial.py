import pytest
import torch
from conftest import ARCHITECTURES, tiny_base
from grid import attach, stored_base

from finetune.methods.blocks import blocks
from finetune.methods.partial import Biases, LastBlocks


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_last_blocks_are_trained(architecture):
    model = attach(LastBlocks(num_blocks=1), tiny_base(architecture))
    first, last = blocks(model)
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    assert trained == {id(p) for p in last.parameters()}
    assert not any(p.requires_grad for p in first.parameters())


@pytest.mark.parametrize("architecture", ["qwen2", "glm", "bloom"])
def test_every_bias_is_trained_and_nothing_else(architecture):
    model = attach(Biases(), tiny_base(architecture))
    assert all(p.requires_grad == name.endswith("bias") for name, p in model.named_parameters())


@pytest.mark.parametrize("method", [LastBlocks(num_blocks=1), Biases()], ids=["freeze", "bitfit"])
@pytest.mark.parametrize("quantize", ["nf4", "int8"])
def test_a_quantized_base_is_refused(method, quantize, tmp_path):
    with pytest.raises(ValueError, match="quantized weights cannot be trained"):
        attach(method, stored_base("qwen2", quantize=quantize, folder=tmp_path))


@pytest.mark.parametrize(("count", "said"), [(0, "at least 1"), (3, "has 2 blocks")])
def test_a_number_of_blocks_that_the_base_cannot_have_is_refused(count, said):
    with pytest.raises(ValueError, match=said):
        attach(LastBlocks(num_blocks=count), tiny_base("qwen2"))


def test_only_the_trained_weights_are_saved(tmp_path):
    method = LastBlocks(num_blocks=1)
    model = attach(method, tiny_base("llama"))
    method.save(model, tmp_path)
    size = sum(4 * p.numel() for p in blocks(model)[1].parameters())
    assert size < (tmp_path / "adapter.safetensors").stat().st_size < size + 2000
    other = tiny_base("llama", seed=1)
    loaded = method.load(other, tmp_path)
    assert torch.equal(loaded.model.layers[1].mlp.up_proj.weight, model.model.layers[1].mlp.up_proj.weight)
    assert not torch.equal(loaded.model.layers[0].mlp.up_proj.weight, model.model.layers[0].mlp.up_proj.weight)
