import copy

import pytest
import torch
from conftest import ARCHITECTURES, tiny_base
from peft import LoraConfig

from finetune.methods.peft import Peft
from finetune.models.lean import lean
from finetune.models.siblings import join_siblings, joined, siblings


def test_siblings_are_found_in_the_order_of_their_calls():
    children = {"up_proj": 4, "v_proj": 3, "q_proj": 1, "o_proj": 9, "gate_proj": 2, "k_proj": 5}
    assert siblings(children) == [[1, 5, 3], [2, 4]]
    assert siblings({"q_proj": 1, "o_proj": 2}) == []


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_joining_changes_no_logits_and_no_bit(architecture):
    model = tiny_base(architecture)
    ids = torch.arange(5, 25)[None]
    expected, before = model(ids).logits, {name: w.clone() for name, w in model.state_dict().items()}
    join_siblings(model)
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    assert torch.equal(model(ids).logits, expected)


@pytest.mark.parametrize("copied", [False, True], ids=["itself", "a-copy-around-the-same-memory"])
def test_what_is_joined_is_not_copied_again(copied):
    model = tiny_base("qwen2")
    join_siblings(model)
    if copied:
        memo = {id(p): torch.nn.Parameter(p.data) for p in model.parameters()}
        model = copy.deepcopy(model, memo)
    attention = model.model.layers[1].self_attn
    weights = [attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight]
    places = [weight.data_ptr() for weight in weights]
    found = joined(weights)
    assert [weight.data_ptr() for weight in weights] == places
    assert found.data_ptr() == places[0]
    assert torch.equal(found, torch.cat(weights))


def test_weights_that_lie_apart_are_brought_together():
    weights = [torch.nn.Parameter(torch.randn(n, 6)) for n in (4, 2, 3)]
    before = [weight.detach().clone() for weight in weights]
    found = joined(weights)
    assert torch.equal(found, torch.cat(before))
    found.fill_(7)
    assert all(bool((weight == 7).all()) for weight in weights)


def test_neighbours_in_the_wrong_order_are_no_matrix():
    memory = torch.arange(24.0).view(6, 4)
    weights = [torch.nn.Parameter(memory[4:]), torch.nn.Parameter(memory[:4])]
    assert torch.equal(joined(weights), torch.cat([memory[4:], memory[:4]]))


def test_where_only_some_siblings_are_tuned_none_is_moved():
    base = tiny_base("qwen2")
    join_siblings(base)
    method = Peft(LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "v_proj"]))
    model = method.attach(base, tokenizer=None, num_steps=1, train_rows=())
    places = {name: weight.data_ptr() for name, weight in model.named_parameters()}
    with lean(model):
        assert {name: weight.data_ptr() for name, weight in model.named_parameters()} == places
