import random

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from conftest import ARCHITECTURES, PACKED, tiny_base

from finetune.evaluate import Decoding, answer_limit, predict
from finetune.methods.blocks import blocks
from finetune.methods.build import build

METHODS = {
    "none": {"_target_": "finetune.methods.none.Untouched"},
    "lora": {"_target_": "peft.LoraConfig", "task_type": "CAUSAL_LM", "target_modules": "all-linear"},
    "prompt": {"_target_": "peft.PromptTuningConfig", "task_type": "CAUSAL_LM", "num_virtual_tokens": 5},
    "ptuning": {"_target_": "peft.PromptEncoderConfig", "task_type": "CAUSAL_LM", "num_virtual_tokens": 5},
    "prefix": {
        "_target_": "finetune.methods.prefix.Prefix",
        "num_virtual_tokens": 5,
        "encoder_hidden_size": 8,
        "num_frozen_tokens": 0,
        "init": "random",
        "text": None,
    },
}


def answers(model, prompts, *, batch_rows, end_ids=(2,), in_places=False, replayed=False):
    how = {"in_places": in_places, "replayed": replayed}
    decoding = Decoding(max_new_tokens=12, batch_rows=batch_rows, end_ids=end_ids, pad_id=0, **how)
    found = {a.number: (a.ids, a.finish_reason) for batch in predict(model, prompts, decoding) for a in batch}
    return [found[n] for n in range(len(prompts))]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("method", METHODS)
def test_answers_do_not_depend_on_the_batch_size(architecture, method, examples):
    built = build({"name": method, "adapter": METHODS[method]})
    torch.manual_seed(0)
    model = built.attach(tiny_base(architecture, seed=1), tokenizer=None, num_steps=1, train_rows=())
    for parameter in model.parameters():
        if parameter.ndim > 1:  # so wide that attention is sharp and positions matter
            torch.nn.init.normal_(parameter, std=0.4)
    prompts = [e.ids for e in examples]
    alone, some, all_at_once = (answers(model, prompts, batch_rows=n) for n in (1, 5, 64))
    assert some == alone == all_at_once
    for prompt, (ids, _) in list(zip(prompts, alone, strict=True))[
        :3
    ]:  # the model that was trained is the one that answers
        logits = model(input_ids=torch.tensor([prompt + ids]), use_cache=False).logits[0, -len(ids) - 1 : -1]
        assert logits.argmax(-1).tolist() == ids
    assert len({tuple(ids) for ids, _ in alone}) > 3


@pytest.mark.parametrize("architecture", PACKED)
@pytest.mark.parametrize("method", METHODS)
def test_answers_in_places_are_those_of_generate(architecture, method, examples):
    built = build({"name": method, "adapter": METHODS[method]})
    torch.manual_seed(0)
    model = built.attach(tiny_base(architecture, seed=1), tokenizer=None, num_steps=1, train_rows=())
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.4)
    prompts, ends = [e.ids for e in examples], range(2, 18)  # so many that rows end at many steps
    with built.lean(model):
        found = answers(model, prompts, batch_rows=5, end_ids=ends, in_places=True)
    assert found == answers(model, prompts, batch_rows=5, end_ids=ends)
    assert len({len(ids) for ids, _ in found}) > 2


def in_four_bits(model):
    """The linear layers of the blocks as NF4, which is made on the way to a GPU."""
    for block in blocks(model):
        for name, layer in list(block.named_modules()):
            if isinstance(layer, torch.nn.Linear):
                torch.nn.init.normal_(layer.weight, std=0.4)
                new = Linear4bit(layer.in_features, layer.out_features, layer.bias is not None, quant_type="nf4")
                new.load_state_dict(layer.state_dict())
                block.set_submodule(name, new)
    return model


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("architecture", PACKED)
@pytest.mark.parametrize("method", [*METHODS, "qlora"])
def test_replayed_answers_are_those_of_generate(architecture, method):
    built = build({"name": method, "adapter": METHODS[method.removeprefix("q")]})
    torch.manual_seed(0)
    base = in_four_bits(tiny_base(architecture, seed=1)) if method == "qlora" else tiny_base(architecture, seed=1)
    model = built.attach(base.cuda(), tokenizer=None, num_steps=1, train_rows=()).cuda()
    for parameter in model.parameters():
        if parameter.ndim > 1 and parameter.is_floating_point():
            torch.nn.init.normal_(parameter, std=0.4)
    draw = random.Random(0)
    prompts = [[draw.randrange(3, 96) for _ in range(draw.randint(2, 30))] for _ in range(400)]
    # Some 12 % of the words, so that most of the rows leave on the way; 4 bits of GLM say them less often.
    ends = range(2, 38 if method == "qlora" else 14)
    with built.lean(model):
        found = answers(model, prompts, batch_rows=300, end_ids=ends, in_places=True, replayed=True)
    assert found == answers(model, prompts, batch_rows=300, end_ids=ends)
    lengths = [len(ids) for ids, _ in found]
    assert sum(n < 7 for n in lengths) > 150  # of a batch of 300 more than half, at the first look
    assert max(lengths) == 12


def test_an_answer_ends_before_its_end_token(examples):
    model = tiny_base("llama")
    torch.nn.init.zeros_(model.lm_head.weight)
    assert answers(model, [[5, 6]], batch_rows=1) == [([0] * 12, "length")]
    decoding = Decoding(max_new_tokens=12, batch_rows=1, end_ids=[0], pad_id=0)
    [[answer]] = predict(model, [[5, 6]], decoding)
    assert (answer.ids, answer.finish_reason) == ([], "stop")


def test_no_answer_needs_more_tokens_than_the_longest_target(examples):
    assert answer_limit(examples) == 20
