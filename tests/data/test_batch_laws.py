"""Packing and padding on rows of any lengths."""

import itertools
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.data.batches import group, pack, pad, plan, plan_by_tokens, supervised


@st.composite
def examples(draw):
    """Rows of distinct tokens: prompts of one token or more, targets of one or more."""
    lengths = draw(st.lists(st.tuples(st.integers(1, 30), st.integers(1, 12)), min_size=1, max_size=10))
    first, found = 3, []
    for prompt, target in lengths:
        found.append(SimpleNamespace(ids=list(range(first, first + prompt + target)), num_prompt=prompt))
        first += prompt + target
    return found


LAWS = settings(deadline=None, max_examples=60)
loss_on = st.sampled_from(["target", "all"])


@LAWS
@given(examples(), loss_on)
def test_packed_and_padded_supervise_the_same_tokens(rows, loss_on):
    packed, padded = pack(rows, loss_on=loss_on), pad(rows, pad_id=0, loss_on=loss_on)
    expected = [row.ids[t + 1] for row in rows for t in supervised(row, loss_on=loss_on)]
    assert packed.labels.tolist() == padded.labels.tolist() == expected
    assert packed.num_tokens == padded.num_tokens == sum(len(row.ids) for row in rows)
    # The token before each label is the one of the same row before it: nothing leaks from row to row.
    for batch in (packed, padded):
        assert (batch.ids.flatten()[batch.kept] + 1).tolist() == batch.labels.tolist()


@LAWS
@given(examples())
def test_every_row_supervises_a_token_so_that_no_mean_is_empty(rows):
    assert all(len(supervised(row, loss_on="target")) >= 1 for row in rows)
    assert len(pack(rows).labels) >= len(rows)


@LAWS
@given(examples())
def test_positions_start_anew_at_each_bound(rows):
    batch = pack(rows)
    bounds = batch.bounds.tolist()
    assert bounds[-1] == batch.num_tokens
    for start, end in itertools.pairwise(bounds):
        assert batch.positions[0, start:end].tolist() == list(range(end - start))
    assert batch.longest == max(end - start for start, end in itertools.pairwise(bounds))


@LAWS
@given(examples())
def test_groups_hold_every_row_once(rows):
    found = [row for part in group(rows) for row in part]
    assert sorted(row.ids[0] for row in found) == [row.ids[0] for row in rows]


@LAWS
@given(st.integers(1, 40), st.integers(1, 9), st.floats(0.1, 4), st.integers(0, 5))
def test_a_plan_has_full_batches_and_every_row_before_any_twice(num_rows, batch_rows, epochs, seed):
    steps = plan(num_rows, epochs=epochs, batch_rows=batch_rows, max_steps=None, seed=seed)
    assert all(len(step) == batch_rows for step in steps)
    order = [row for step in steps for row in step]
    for start in range(0, len(order) - num_rows + 1, num_rows):
        assert sorted(order[start : start + num_rows]) == list(range(num_rows))
    assert len(order) == pytest.approx(epochs * num_rows, abs=batch_rows)


lengths = st.lists(st.integers(1, 50), min_size=1, max_size=40)


@LAWS
@given(lengths, st.integers(0, 200), st.floats(0.1, 4), st.integers(0, 5))
def test_steps_by_tokens_keep_their_budget_and_leave_no_room_for_the_next_row(lengths, more, epochs, seed):
    budget = max(lengths) + more
    steps = plan_by_tokens(lengths, epochs=epochs, batch_tokens=budget, max_steps=None, seed=seed)
    sizes = [sum(lengths[row] for row in step) for step in steps]
    assert all(0 < size <= budget for size in sizes)
    for size, step in zip(sizes, steps[1:], strict=False):
        assert size + lengths[step[0]] > budget


@LAWS
@given(lengths, st.integers(0, 200), st.floats(0.1, 4), st.integers(0, 5))
def test_steps_by_tokens_have_the_order_of_steps_by_rows(lengths, more, epochs, seed):
    steps = plan_by_tokens(lengths, epochs=epochs, batch_tokens=max(lengths) + more, max_steps=None, seed=seed)
    order = [row for step in steps for row in step]
    rows = plan(len(lengths), epochs=len(order) / len(lengths), batch_rows=1, max_steps=None, seed=seed)
    assert order == [row for [row] in rows][: len(order)]
    # The epochs are over in the last step, and not before it.
    assert len(order) - len(steps[-1]) < epochs * len(lengths) <= len(order)


@LAWS
@given(lengths, st.integers(1, 9))
def test_a_plan_by_tokens_ends_at_its_last_step(lengths, max_steps):
    given = {"epochs": 3.0, "batch_tokens": 60, "seed": 1}
    whole = plan_by_tokens(lengths, max_steps=None, **given)
    assert plan_by_tokens(lengths, max_steps=max_steps, **given) == whole[:max_steps]
