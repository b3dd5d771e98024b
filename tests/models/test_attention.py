import pytest
import torch
from conftest import PACKED, tiny_base
from exactness import assert_a_pack_is_its_rows

from finetune.data.batches import pack, pad
from finetune.feeder import summed_loss
from finetune.models.attention import packing


@pytest.mark.parametrize("architecture", PACKED)
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointed"])
def test_a_pack_has_the_loss_and_gradients_of_single_rows(architecture, checkpointing, examples):
    model = tiny_base(architecture).train()
    assert_a_pack_is_its_rows(model, examples, checkpointing=checkpointing)


@pytest.mark.parametrize("architecture", [*PACKED, "bloom"])
def test_padding_does_not_change_the_loss(architecture, examples):
    model = tiny_base(architecture)
    single = sum(summed_loss(model, pad([e], pad_id=0)) for e in examples)
    assert summed_loss(model, pad(examples, pad_id=0)).item() == pytest.approx(single.item(), rel=1e-5)


def test_attention_is_as_before_after_packing(examples):
    model = tiny_base("llama")
    before = model.config._attn_implementation
    with pytest.raises(RuntimeError), packing(model):
        raise RuntimeError
    assert model.config._attn_implementation == before


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("architecture", PACKED)
def test_packs_on_a_gpu_are_as_near_to_float32_as_single_rows(architecture, examples):
    exact, half = (tiny_base(architecture).to("cuda", dtype) for dtype in (torch.float32, torch.bfloat16))
    expected = sum(summed_loss(exact, pad([e], pad_id=0).to("cuda")) for e in examples).item()
    single = sum(summed_loss(half, pad([e], pad_id=0).to("cuda")) for e in examples).item()
    with packing(half), torch.autocast("cuda", torch.bfloat16):
        packed = summed_loss(half, pack(examples).to("cuda"))
        packed.backward()
    assert abs(packed.item() - expected) <= 2 * abs(single - expected) + 1e-3 * expected
    assert all(p.grad.isfinite().all() for p in half.parameters() if p.grad is not None)
