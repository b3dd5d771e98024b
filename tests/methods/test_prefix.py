from types import SimpleNamespace

import pytest
import torch
from conftest import ARCHITECTURES, PACKED, tiny_base
from exactness import assert_a_pack_is_its_rows, assert_learns, assert_same
from grid import attach, logits, varied_base
from peft import CartridgeConfig, PeftModel, PrefixTuningConfig, get_peft_model

from finetune.data.batches import pack, pad
from finetune.evaluate import Decoding, predict
from finetune.feeder import summed_loss
from finetune.methods.build import build
from finetune.methods.method import trainable
from finetune.methods.prefix import Prefix
from finetune.models.attention import packing

NUM = 5
TEXT = [40, 41, 42, 43, 44, 45, 46]
KINDS = {
    "plain": {},
    "projected": {"encoder_hidden_size": 8},
    "frozen": {"num_frozen_tokens": 2},
}


def method(**changes):
    return Prefix(**({"num_virtual_tokens": NUM} | changes))


def tokenizer(text, *, add_special_tokens):
    return SimpleNamespace(input_ids=[ord(letter) for letter in text])


def tuned(architecture, **changes):
    return attach(method(**changes), varied_base(architecture))


def of_text(architecture, **changes):
    changed = method(init="text", text="".join(map(chr, TEXT)), **changes)
    return changed.attach(varied_base(architecture), tokenizer=tokenizer, num_steps=1, train_rows=())


def peft_twin(model, architecture, kind):
    """PEFT's model with the same weights."""
    shared = {"task_type": "CAUSAL_LM", "num_virtual_tokens": NUM}
    if kind == "frozen":
        theirs = get_peft_model(varied_base(architecture), CartridgeConfig(**shared, num_frozen_tokens=2))
        theirs.prompt_encoder["default"].load_prompt_embeddings(model.prefix.flat().detach())
        return theirs
    projected = {"prefix_projection": True, "encoder_hidden_size": 8} if kind == "projected" else {}
    theirs = get_peft_model(varied_base(architecture), PrefixTuningConfig(**shared, **projected))
    theirs.prompt_encoder["default"].load_state_dict(model.prefix.state_dict())
    return theirs


def gradients(model):
    found = {n.rsplit("prefix.")[-1].split("default.")[-1]: p.grad.clone() for n, p in named(model) if p.requires_grad}
    model.zero_grad()
    return found


def named(model):
    return [(n, p) for n, p in model.named_parameters() if p.grad is not None]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("kind", KINDS)
def test_it_is_pefts(kind, architecture, examples):
    ours = tuned(architecture, **KINDS[kind])
    theirs = peft_twin(ours, architecture, kind)
    batch = pad(examples, pad_id=0)
    losses = [summed_loss(model, batch) for model in (ours, theirs)]
    torch.testing.assert_close(*losses)
    for example in examples[:3]:
        ids = torch.tensor([example.ids])
        torch.testing.assert_close(logits(ours, ids), logits(theirs, ids), rtol=1e-4, atol=1e-5)
    for loss in losses:
        loss.backward()
    found, expected = gradients(ours), gradients(theirs)
    if kind == "frozen":
        found, expected = ({"weight": next(iter(g.values()))} for g in (found, expected))
    assert_same(found, expected)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("kind", KINDS)
def test_peft_loads_it(kind, architecture, tmp_path, examples):
    ours, ids = tuned(architecture, **KINDS[kind]), torch.tensor([examples[1].ids])
    method(**KINDS[kind]).save(ours, tmp_path)
    theirs = PeftModel.from_pretrained(varied_base(architecture), tmp_path)
    again = method(**KINDS[kind]).load(varied_base(architecture), tmp_path)
    for model in (theirs, again):
        torch.testing.assert_close(logits(model, ids), logits(ours, ids), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("architecture", PACKED)
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointed"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_pack_has_the_loss_and_gradients_of_single_rows(kind, architecture, checkpointing, examples):
    model = tuned(architecture, **KINDS[kind]).train()
    assert_a_pack_is_its_rows(model, examples, checkpointing=checkpointing)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("kind", KINDS)
def test_recomputed_activations_give_the_same_gradients_also_of_several_passes(kind, architecture, examples):
    model = tuned(architecture, **KINDS[kind]).train()
    found = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        parts = (examples[:3], examples[3:])
        sum(summed_loss(model, pad(part, pad_id=0)) for part in parts).backward()
        found.append(gradients(model))
    assert_same(*found)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_cache_begins_with_it_and_changes_nothing(architecture, examples):
    model = tuned(architecture)
    ids = torch.tensor([examples[1].ids[:12]])
    with torch.no_grad():
        first = model(input_ids=ids[:, :7])
        steps, cache = [first.logits], first.past_key_values
        steps += [model(input_ids=ids[:, n : n + 1], past_key_values=cache).logits for n in range(7, 12)]
    torch.testing.assert_close(torch.cat(steps, dim=1), logits(model, ids), rtol=1e-4, atol=1e-5)
    assert cache.get_seq_length() == NUM + 12
    for layer, expected in zip(cache.layers, method().prefix_kv(model), strict=True):
        assert torch.equal(torch.stack([layer.keys[0, :, :NUM], layer.values[0, :, :NUM]]), expected)


def answers(model, prompts, *, batch_rows):
    decoding = Decoding(max_new_tokens=12, batch_rows=batch_rows, end_ids=[2], pad_id=0)
    found = {a.number: (a.ids, a.finish_reason) for batch in predict(model, prompts, decoding) for a in batch}
    return [found[n] for n in range(len(prompts))]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_answers_are_pefts_and_do_not_depend_on_the_batch(architecture, examples):
    model = attach(method(), tiny_base(architecture, seed=1))
    for parameter in model.parameters():
        if parameter.ndim > 1:  # so wide that attention is sharp and positions matter
            torch.nn.init.normal_(parameter, std=0.4)
    prompts = [e.ids for e in examples]
    alone, some, all_at_once = (answers(model, prompts, batch_rows=n) for n in (1, 5, 64))
    assert some == alone == all_at_once
    assert len({tuple(ids) for ids, _ in alone}) > 3
    theirs = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=NUM)
    theirs = get_peft_model(tiny_base(architecture, seed=1), theirs)
    theirs.base_model.load_state_dict({n: p for n, p in model.state_dict().items() if "prefix" not in n})
    theirs.prompt_encoder["default"].load_state_dict(model.prefix.state_dict())
    assert answers(theirs, prompts[:4], batch_rows=1) == alone[:4]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("kind", KINDS)
def test_from_a_text_it_starts_as_that_text(kind, architecture, examples):
    model, base = of_text(architecture, **KINDS[kind]), varied_base(architecture)
    ids = torch.tensor([examples[1].ids])
    after = logits(base, torch.cat([torch.tensor([TEXT[:NUM]]), ids], dim=1))[:, NUM:]
    torch.testing.assert_close(logits(model, ids), after, rtol=1e-4, atol=1e-5)


def test_a_short_text_is_repeated_and_rows_serve_as_one():
    changed = method(init="text", encoder_hidden_size=8)
    row = SimpleNamespace(prompt="(", target=")")
    given = {"tokenizer": tokenizer, "num_steps": 1}
    model = changed.attach(varied_base("qwen2"), **given, train_rows=[row])
    same = method(init="text", text="(\n)").attach(varied_base("qwen2"), **given, train_rows=())
    torch.testing.assert_close(changed.prefix_kv(model), method().prefix_kv(same))
    with pytest.raises(ValueError, match="needs a text"):
        changed.attach(varied_base("qwen2"), **given, train_rows=())


def test_a_projection_from_a_text_learns(examples):
    model = of_text("qwen2", encoder_hidden_size=8)
    assert_learns(model, examples, lr=3e-2)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_it_stays_in_float32_in_a_half_precision_base(architecture, examples):
    model = attach(method(), varied_base(architecture).bfloat16())
    batch = pad(examples, pad_id=0)
    assert {p.dtype for p in trainable(model)} == {torch.float32}
    assert logits(model, batch.ids).dtype == torch.bfloat16
    exact = tuned(architecture).train()
    with torch.autocast("cpu", torch.bfloat16):
        half = summed_loss(exact, batch)
    assert half.item() == pytest.approx(summed_loss(exact, batch).item(), rel=1e-2)
    assert answers(model, [examples[0].ids], batch_rows=1)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_virtual_tokens": 0}, "must be less than num_virtual_tokens="),
        ({"num_frozen_tokens": NUM}, "must be less than num_virtual_tokens="),
        ({"encoder_hidden_size": 0}, "encoder_hidden_size=0"),
        ({"encoder_hidden_size": 8, "num_frozen_tokens": 1}, "no tokens are frozen"),
        ({"init": "texts"}, "random and text"),
    ],
)
def test_refuses(changes, said):
    arguments = {"num_virtual_tokens": NUM} | changes
    with pytest.raises(ValueError, match=said):
        build({"name": "m", "adapter": {"_target_": "finetune.methods.prefix.Prefix", **arguments}})


def test_a_prefix_of_another_base_is_refused(tmp_path):
    method().save(tuned("qwen2"), tmp_path)
    with pytest.raises(ValueError, match="another base"):
        method().load(tiny_base("bloom"), tmp_path)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("architecture", PACKED)
def test_packs_on_a_gpu_are_as_near_to_float32_as_single_rows(architecture, examples):
    exact, half = (attach(method(), tiny_base(architecture).to("cuda", t)) for t in (torch.float32, torch.bfloat16))
    expected = sum(summed_loss(exact, pad([e], pad_id=0).to("cuda")) for e in examples).item()
    single = sum(summed_loss(half, pad([e], pad_id=0).to("cuda")) for e in examples).item()
    with packing(half), torch.autocast("cuda", torch.bfloat16):
        packed = summed_loss(half, pack(examples).to("cuda"))
        packed.backward()
    assert abs(packed.item() - expected) <= 2 * abs(single - expected) + 1e-3 * expected
    assert all(p.grad.isfinite().all() for p in trainable(half))
