"""A base that is kept: the next run finds it as it was."""

import copy
from pathlib import Path

import pytest
import torch
from conftest import ARCHITECTURES, tiny_base
from grid import attach, make

from finetune.models.load import Base
from finetune.shelf import Shelf

HOW = {"scale": "tiny", "quantize": None, "device": "cpu", "max_tokens": 64, "log": print}
METHODS = ("lora", "dora", "prefix", "prompt", "adapter", "llama_adapter", "vera", "ia3", "adalora")


@pytest.fixture
def loaded(monkeypatch):
    """What was loaded; the files are not looked at."""
    found = []

    def load(model, **how):
        network = tiny_base(model["architecture"])
        found.append(network)
        return Base(network, None, "somewhere", "hash", 1, (2,), 1.0, Path())

    monkeypatch.setattr("finetune.shelf.load", load)
    monkeypatch.setattr("finetune.shelf.sources.resolve", lambda model, **_: type("Source", (), {"name": "s"})())
    monkeypatch.setattr("finetune.shelf.sources.weights_hash", lambda source: "hash")
    return found


def logits(model):
    with torch.no_grad():
        return model(input_ids=torch.arange(5, 25)[None], use_cache=False).logits


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("method", METHODS)
def test_a_method_leaves_nothing_behind(loaded, architecture, method):
    shelf, model = Shelf(), {"architecture": architecture}
    expected = logits(tiny_base(architecture))
    tuned = attach(make(method, architecture), shelf.load(model, intact=True, **HOW).model)
    for parameter in tuned.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter)
    assert not torch.equal(logits(tuned), expected)
    shelf.check()
    again = shelf.load(model, intact=True, **HOW).model
    assert len(loaded) == 1
    assert torch.equal(logits(again), expected)
    assert all(parameter.requires_grad for parameter in again.parameters())
    assert [name for name, _ in again.named_modules()] == [name for name, _ in loaded[0].named_modules()]


def test_the_weights_lie_in_memory_once(loaded):
    shelf = Shelf()
    one, other = (shelf.load({"architecture": "qwen2"}, intact=True, **HOW).model for _ in range(2))
    for mine, theirs in zip(one.parameters(), other.parameters(), strict=True):
        assert mine is not theirs
        assert mine.data_ptr() == theirs.data_ptr()


def test_tied_weights_stay_tied(loaded):
    shelf = Shelf()
    base = shelf.load({"architecture": "bloom"}, intact=True, **HOW).model
    assert base.get_output_embeddings().weight is base.get_input_embeddings().weight


def test_a_base_whose_weights_were_moved_is_read_again(loaded):
    shelf, model = Shelf(), {"architecture": "llama"}
    moved = shelf.load(model, intact=True, **HOW).model
    with torch.no_grad():
        next(moved.parameters())[3, 4] += 1
    shelf.check()
    again = shelf.load(model, intact=True, **HOW).model
    assert len(loaded) == 2
    assert torch.equal(logits(again), logits(tiny_base("llama")))


def test_a_run_that_moves_the_weights_has_a_base_of_its_own(loaded):
    shelf, model = Shelf(), {"architecture": "llama"}
    kept = shelf.load(model, intact=True, **HOW).model
    before = copy.deepcopy(kept.state_dict())
    own = shelf.load(model, intact=False, **HOW).model
    with torch.no_grad():
        for parameter in own.parameters():
            parameter.zero_()
    assert all(torch.equal(kept.state_dict()[name], weight) for name, weight in before.items())
    shelf.load(model, intact=True, **HOW)
    assert len(loaded) == 3


@pytest.mark.parametrize("change", [{"device": "cuda"}, {"max_tokens": 99}, {"quantize": "nf4"}], ids=str)
def test_another_base_takes_the_place(loaded, change):
    shelf, model = Shelf(), {"architecture": "llama"}
    for how in (HOW, HOW | change, HOW):
        shelf.load(model, intact=True, **how)
    assert len(loaded) == 3
