import weakref

import pytest
import torch
from conftest import ARCHITECTURES, tiny_base
from peft import LoraConfig

from finetune.methods.peft import Peft
from finetune.models.lean import lean
from finetune.models.siblings import ROOM, join_siblings, joined, siblings
from finetune.shelf import _around_the_same_weights


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
        model = _around_the_same_weights(model)
    attention, network = model.model.layers[1].self_attn, model.model.layers[1].mlp
    for layers in ((attention.q_proj, attention.k_proj, attention.v_proj), (network.gate_proj, network.up_proj)):
        weights = [layer.weight for layer in layers]
        places = [weight.data_ptr() for weight in weights]
        found = joined(weights)
        assert [weight.data_ptr() for weight in weights] == places
        assert found.data_ptr() == places[0]
        assert torch.equal(found[:, : weights[0].shape[1]], torch.cat(weights))


def test_weights_that_lie_apart_are_brought_together():
    weights = [torch.nn.Parameter(torch.randn(n, 6)) for n in (4, 2, 3)]
    before = [weight.detach().clone() for weight in weights]
    found = joined(weights)
    assert torch.equal(found, torch.cat(before))
    found.fill_(7)
    assert all(bool((weight == 7).all()) for weight in weights)


@pytest.mark.parametrize(("outs", "width", "shape"), [((9, 7), 8, (16, 8 + ROOM)), ((4,), 8, (4 + ROOM, 8))])
def test_beside_wide_and_below_tall_matrices_there_is_room(outs, width, shape):
    weights = [torch.nn.Parameter(torch.randn(n, width)) for n in outs]
    before = torch.cat([weight.detach() for weight in weights])
    found = joined(weights)
    assert found.shape == shape
    assert torch.equal(found[: sum(outs), :width], before)
    assert not found[sum(outs) :].any()
    assert not found[:, width:].any()
    found[sum(outs) :], found[:, width:] = 7, 7  # nobody else's
    assert torch.equal(torch.cat(weights), before)


@pytest.mark.parametrize("change", ["order", "memory", "room"])
def test_what_does_not_lie_in_its_matrix_any_more_is_joined_again(change):
    weights = [torch.nn.Parameter(torch.randn(n, 4)) for n in (3, 5)]
    first = joined(weights)
    if change == "order":
        weights = weights[::-1]
    elif change == "memory":
        weights[1].data = weights[1].data.clone()
    before = torch.cat([weight.detach().clone() for weight in weights])
    found = joined(weights, room=change != "room")
    assert found.data_ptr() != first.data_ptr()
    assert torch.equal(found[:, :4], before)


def test_room_is_not_taken_from_siblings_that_are_as_large_as_it():
    q, k, v = (torch.nn.Parameter(torch.randn(n, 128)) for n in (32, ROOM // 2, ROOM // 2))
    before = torch.cat([q, k, v]).clone()
    joined([q, k, v])
    found = joined([q])
    assert found.shape == q.shape  # as its room would be k and v
    assert torch.equal(torch.cat([q, k, v]), before)


def test_a_converted_weight_keeps_no_old_matrix():
    weight = torch.nn.Parameter(torch.randn(16, 4))
    old = weakref.ref(joined([weight]).untyped_storage())
    weight.data = weight.data.bfloat16()
    assert old() is None
    assert joined([weight]).dtype == torch.bfloat16


def test_where_only_some_siblings_are_tuned_none_is_moved():
    base = tiny_base("qwen2")
    join_siblings(base)
    method = Peft(LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "v_proj"]))
    model = method.attach(base, tokenizer=None, num_steps=1, train_rows=())
    places = {name: weight.data_ptr() for name, weight in model.named_parameters()}
    with lean(model):
        assert {name: weight.data_ptr() for name, weight in model.named_parameters()} == places
