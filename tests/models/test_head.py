"""The loss at the head, in parts or not, is the cross-entropy of the logits that the model gives."""

import functools

import pytest
import torch
import transformers
from accelerate.utils import convert_outputs_to_fp32
from conftest import ARCHITECTURES, PACKED, tiny_base
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.utils import counters
from torch.nn.functional import cross_entropy

from finetune.data.batches import pack, pad
from finetune.feeder import summed_loss
from finetune.methods.build import build
from finetune.models.attention import packing
from finetune.models.head import _compiled, _compiled_with_slope, _with_slope
from finetune.models.lean import lean

LORA = {"_target_": "peft.LoraConfig", "task_type": "CAUSAL_LM", "r": 4, "init_lora_weights": False}
LINEAR = {**LORA, "target_modules": "all-linear"}
ADAPTERS = {
    "lora": LINEAR,
    "full": {"_target_": "finetune.methods.full.Full"},
    "freeze": {"_target_": "finetune.methods.partial.LastBlocks", "num_blocks": 1},
    "prefix": {"_target_": "finetune.methods.prefix.Prefix", "num_virtual_tokens": 3},
    "prompt": {"_target_": "peft.PromptTuningConfig", "task_type": "CAUSAL_LM", "num_virtual_tokens": 3},
    "a copy of the head": {**LINEAR, "modules_to_save": ["lm_head"]},
    "lora on the head": {**LORA, "target_modules": ["lm_head"]},
}
IN_PARTS = 96 * 5  # logits at once: five positions


def tuned(architecture, adapter):
    base = tiny_base(architecture)
    model = build({"name": "m", "adapter": dict(adapter)}).attach(base, tokenizer=None, num_steps=1, train_rows=())
    return model, base


def own_loss(model, batch):
    """As transformers' models are asked: logits of every position."""
    logits = model(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False).logits
    chosen = logits[:, -batch.longest :].flatten(0, 1)[batch.kept]
    return cross_entropy(chosen.float(), batch.labels, reduction="sum")


def gradients(loss, model):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def same(found, expected, model):
    (loss, slopes), (other, others) = ((x.item(), gradients(x, model)) for x in (found, expected))
    assert loss == pytest.approx(other, rel=1e-6)
    assert slopes.keys() == others.keys() != set()
    for name, slope in slopes.items():
        largest = others[name].abs().max()
        assert (slope - others[name]).abs().max() <= 1e-6 * max(1.0, largest), name


@pytest.mark.parametrize("most", [IN_PARTS, 10**9], ids=["in parts", "at once"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_a_padded_batch_has_the_loss_and_gradients_of_its_logits(adapter, architecture, most, examples):
    model, _ = tuned(architecture, ADAPTERS[adapter])
    batch = pad(examples, pad_id=0)
    same(summed_loss(model, batch, most=most), own_loss(model, batch), model)


@pytest.mark.parametrize("architecture", PACKED)
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_a_pack_in_parts_is_the_pack_at_once(adapter, architecture, examples):
    model, base = tuned(architecture, ADAPTERS[adapter])
    batch = pack(examples, loss_on="all")
    with packing(base):
        same(summed_loss(model, batch, most=IN_PARTS), summed_loss(model, batch), model)


@pytest.mark.parametrize("targets", ["all-linear", ["lm_head"], ["lm_head", "q_proj"]], ids=str)
def test_lean_layers_in_parts_are_plain_ones_at_once(targets, examples):
    model, base = tuned("llama", {**LORA, "target_modules": targets})
    batch = pack(examples)
    with packing(base):
        expected = summed_loss(model, batch)
        with lean(model):
            same(summed_loss(model, batch, most=IN_PARTS), expected, model)


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 20_000))
def test_no_number_of_parts_changes_the_loss(most):
    torch.manual_seed(0)
    base = tiny_base("llama")
    ids = torch.randint(3, 96, (40,)).tolist()
    batch = pack([type("Row", (), {"ids": ids, "num_prompt": 1})()])
    with packing(base), torch.no_grad():
        assert summed_loss(base, batch, most=most).item() == pytest.approx(summed_loss(base, batch).item(), rel=1e-6)


@pytest.mark.parametrize("way", [_with_slope, _compiled_with_slope], ids=["plain", "compiled"])
def test_the_gradient_is_the_cross_entropys_and_ignored_labels_have_none(way, monkeypatch):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager", fullgraph=True))
    _compiled.cache_clear()
    torch._dynamo.reset()
    counters.clear()
    generator = torch.Generator().manual_seed(0)
    for positions in (5, 9, 40):
        exact = (6 * torch.randn(positions, 96, generator=generator)).requires_grad_()
        labels = torch.randint(96, (positions,), generator=generator)
        labels[1::3] = -100
        expected = cross_entropy(exact, labels, reduction="sum")
        [slope] = torch.autograd.grad(expected, exact)
        loss, found = way(exact.detach(), labels)
        torch.testing.assert_close(loss, expected.detach(), rtol=1e-6, atol=0)
        torch.testing.assert_close(found, slope, rtol=1e-5, atol=1e-7)
        assert not found[labels == -100].any()
    assert counters["stats"]["unique_graphs"] == (way is _compiled_with_slope)  # one for all sizes
    _compiled.cache_clear()


def test_where_the_answer_is_nearly_certain_a_coarse_gradient_is_rounded_once():
    logits = torch.tensor([[9.0, 0.0, 0.0]], dtype=torch.bfloat16)
    _, found = _with_slope(logits, torch.tensor([0]))
    assert found[0, 0] == torch.softmax(logits.double(), -1)[0, 0].sub(1).bfloat16() != 0


def test_no_head_ever_sees_more_positions_than_asked_for(examples):
    base, seen = tiny_base("qwen2"), []
    own = base.lm_head.forward
    base.lm_head.forward = lambda hidden: seen.append(hidden.shape) or own(hidden)
    batch = pad(examples, pad_id=0)
    summed_loss(base, batch, most=IN_PARTS).backward()
    assert all(len(shape) == 2 and shape[0] <= 5 for shape in seen)
    assert sum(shape[0] for shape in seen) == len(batch.labels)
    assert base.lm_head.forward(torch.zeros(1, 32)).shape == (1, 96)  # and what was there is there again


def test_an_error_leaves_the_head_as_it_was(examples):
    base = tiny_base("qwen2")
    base.lm_head.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        summed_loss(base, pad(examples, pad_id=0))
    assert "forward" not in vars(base.lm_head)


class InPlace(transformers.Qwen2ForCausalLM):
    """Scales its logits where they lie."""

    def forward(self, *args, **kwargs):
        found = super().forward(*args, **kwargs)
        found.logits.mul_(0.5)
        return found


class Unasked(transformers.Qwen2ForCausalLM):
    """Uses the weights of its head, and not the head."""

    def forward(self, *args, **kwargs):
        found = super().forward(*args, **kwargs)
        hidden = self.model(kwargs["input_ids"], attention_mask=kwargs["attention_mask"]).last_hidden_state
        found.logits = hidden @ self.lm_head.weight.T
        return found


SHAPE = {
    **{"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 8},
    **{"num_key_value_heads": 2, "intermediate_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
}
OTHERS = {
    "gemma2": lambda: transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**SHAPE, final_logit_softcapping=0.5)),
    "cohere": lambda: transformers.CohereForCausalLM(transformers.CohereConfig(**SHAPE, logit_scale=0.3)),
    "granite": lambda: transformers.GraniteForCausalLM(transformers.GraniteConfig(**SHAPE, logits_scaling=7.0)),
    "in place": lambda: InPlace(transformers.Qwen2Config(**SHAPE)),
    "head not called": lambda: Unasked(transformers.Qwen2Config(**SHAPE)),
}


@pytest.mark.parametrize("name", OTHERS)
def test_bases_that_change_their_logits_keep_their_own(name, examples):
    torch.manual_seed(0)
    model = OTHERS[name]().eval()
    batch = pad(examples, pad_id=0)
    for _ in range(2):
        same(summed_loss(model, batch, most=IN_PARTS), own_loss(model, batch), model)


def test_mixed_precision_is_that_of_the_prepared_model(examples):
    base = tiny_base("qwen2")
    # What Accelerate makes of a model under bf16: autocast within, float32 outputs.
    base.forward = convert_outputs_to_fp32(torch.autocast("cpu", torch.bfloat16)(base.forward))
    batch, heads = pad(examples, pad_id=0), []
    base.lm_head.register_forward_pre_hook(lambda head, args: heads.append(torch.is_autocast_enabled("cpu")))
    expected, found = own_loss(base, batch), summed_loss(base, batch, most=IN_PARTS)
    assert heads == [True, True]
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(expected.item(), rel=1e-4)
    ours, theirs = gradients(found, base), gradients(expected, base)
    for name, slope in ours.items():
        torch.testing.assert_close(slope, theirs[name], rtol=0.02, atol=0.02 * float(theirs[name].abs().max()))


def test_a_scaled_loss_scales_the_gradients(examples):
    base = tiny_base("qwen2")
    batch = pad(examples, pad_id=0)
    one = gradients(summed_loss(base, batch, most=IN_PARTS), base)
    third = gradients(summed_loss(base, batch, most=IN_PARTS) / 3, base)
    for name, slope in one.items():
        torch.testing.assert_close(third[name], slope / 3, rtol=1e-4, atol=1e-6)
