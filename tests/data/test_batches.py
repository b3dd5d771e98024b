import itertools
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune.data.batches import bounded, group, pack, pad, plan, supervised


def test_every_epoch_shows_every_row_once_in_a_new_order():
    steps = plan(24, epochs=3, batch_rows=8, max_steps=None, seed=1)
    epochs = [[*steps[i], *steps[i + 1], *steps[i + 2]] for i in (0, 3, 6)]
    assert len(steps) == 9
    assert all(sorted(epoch) == list(range(24)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


@pytest.mark.parametrize(("epochs", "max_steps", "expected"), [(1, None, 2), (0.5, None, 1), (2, None, 3), (9, 4, 4)])
def test_all_batches_are_full(epochs, max_steps, expected):
    steps = plan(10, epochs=epochs, batch_rows=7, max_steps=max_steps, seed=0)
    assert [len(step) for step in steps] == [7] * expected


def test_the_seed_is_the_order():
    same = [plan(50, epochs=1, batch_rows=8, max_steps=None, seed=seed) for seed in (1, 1, 2)]
    assert same[0] == same[1] != same[2]


def test_only_answers_are_supervised(examples):
    example = examples[1]
    assert list(supervised(example, loss_on="target")) == list(range(19, 39))
    assert list(supervised(example, loss_on="all")) == list(range(39))


@pytest.mark.parametrize("loss_on", ["target", "all"])
def test_packed_and_padded_batches_hold_the_same_labels(examples, loss_on):
    packed, padded = pack(examples, loss_on=loss_on), pad(examples, pad_id=0, loss_on=loss_on)
    assert packed.labels.tolist() == padded.labels.tolist()
    assert packed.num_tokens == padded.num_tokens == sum(len(e.ids) for e in examples)
    assert packed.ids[0][packed.kept].tolist() == padded.ids.flatten()[padded.kept].tolist()
    assert packed.bounds.diff().tolist() == [len(e.ids) for e in examples]
    assert packed.positions[0][packed.bounds[:-1].long()].tolist() == [0] * len(examples)


def test_groups_keep_all_rows_and_bound_the_padding(examples):
    groups = list(group(examples))
    assert Counter(id(e) for g in groups for e in g) == Counter(map(id, examples))
    for found in groups:
        assert sum(len(e.ids) for e in found) >= 0.75 * len(found) * max(len(e.ids) for e in found)


@given(st.lists(st.integers(0, 9)), st.integers(1, 12))
def test_bounded_groups_are_full_and_keep_the_order(sizes, limit):
    groups = list(bounded(sizes, size=int, limit=limit))
    assert [size for group in groups for size in group] == sizes
    assert all(sum(group) <= limit or len(group) == 1 for group in groups)
    assert all(sum(one) + after[0] > limit for one, after in itertools.pairwise(groups))
