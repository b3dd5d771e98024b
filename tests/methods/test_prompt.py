import pytest
import torch
from conftest import ARCHITECTURES, PACKED, tiny_base
from exactness import assert_a_pack_is_its_rows
from grid import attach, logits, make, varied_base
from peft import PeftModel

from finetune.data.batches import pad
from finetune.evaluate import Decoding, predict
from finetune.feeder import summed_loss
from finetune.methods.method import trainable


def gradients(model):
    found = {
        n.split(".")[-2] + n.split(".")[-1]: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad
    }
    model.zero_grad()
    return found


def twin(name, model, architecture):
    """PEFT's model with the same weights."""
    method = make(name, architecture)
    attach(method, varied_base(architecture))
    theirs = method.wrapper
    theirs.prompt_encoder["default"].load_state_dict(model.prompt_encoder.state_dict())
    theirs.get_base_model()._forward_pre_hooks.clear()
    theirs.get_base_model()._forward_pre_hooks_with_kwargs.clear()
    return theirs


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("name", ["prompt", "ptuning"])
def test_it_is_pefts(name, architecture, examples):
    ours = attach(make(name, architecture), varied_base(architecture))
    theirs = twin(name, ours, architecture)
    batch = pad(examples, pad_id=0)
    losses = [summed_loss(model, batch) for model in (ours, theirs)]
    torch.testing.assert_close(*losses)
    for loss in losses:
        loss.backward()
    found, expected = gradients(ours), gradients(theirs)
    assert found.keys() == expected.keys()
    for key, gradient in expected.items():
        torch.testing.assert_close(found[key], gradient, rtol=1e-4, atol=1e-5, msg=key)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("name", ["prompt", "ptuning"])
def test_peft_loads_it(name, architecture, tmp_path, examples):
    method = make(name, architecture)
    ours, ids = attach(method, varied_base(architecture)), torch.tensor([examples[1].ids])
    method.save(ours, tmp_path)
    theirs = PeftModel.from_pretrained(varied_base(architecture), tmp_path)
    torch.testing.assert_close(logits(theirs, ids), logits(ours, ids), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("architecture", PACKED)
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointed"])
@pytest.mark.parametrize("name", ["prompt", "ptuning"])
def test_a_pack_has_the_loss_and_gradients_of_single_rows(name, architecture, checkpointing, examples):
    model = attach(make(name, architecture), varied_base(architecture)).train()
    assert_a_pack_is_its_rows(model, examples, checkpointing=checkpointing)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_cache_changes_nothing(architecture, examples):
    model = attach(make("prompt", architecture), varied_base(architecture))
    ids = torch.tensor([examples[1].ids[:12]])
    with torch.no_grad():
        first = model(ids[:, :7])
        steps, cache = [first.logits[:, -7:]], first.past_key_values
        steps += [model(input_ids=ids[:, n : n + 1], past_key_values=cache).logits for n in range(7, 12)]
    torch.testing.assert_close(torch.cat(steps, dim=1), logits(model, ids), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_answers_do_not_depend_on_the_batch(architecture, examples):
    model = attach(make("prompt", architecture), tiny_base(architecture, seed=1))
    for parameter in model.parameters():
        if parameter.ndim > 1:  # so wide that attention is sharp and positions matter
            torch.nn.init.normal_(parameter, std=0.4)
    found = []
    for batch_rows in (1, 5, 64):
        decoding = Decoding(max_new_tokens=12, batch_rows=batch_rows, end_ids=[2], pad_id=0)
        answers = [a for batch in predict(model, [e.ids for e in examples], decoding) for a in batch]
        found.append({a.number: a.ids for a in answers})
    assert found[0] == found[1] == found[2]
    assert len({tuple(ids) for ids in found[0].values()}) > 3


def test_they_stay_in_float32_in_a_half_precision_base(examples):
    model = attach(make("prompt", "qwen2"), varied_base("qwen2").bfloat16())
    assert {p.dtype for p in trainable(model)} == {torch.float32}
    assert logits(model, pad(examples, pad_id=0).ids).dtype == torch.bfloat16
