import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune.data import split

ids = st.lists(st.text(st.characters(blacklist_categories=("Cs",))), min_size=2, max_size=60, unique=True)
shares = st.floats(0.01, 0.99)


@given(ids, shares)
def test_by_hash_every_row_is_on_exactly_one_side_in_order_and_neither_is_empty(ids, share):
    train, valid = split.by_hash(ids, valid_fraction=share)
    assert sorted([*train, *valid]) == list(range(len(ids)))
    assert train == sorted(train)
    assert valid == sorted(valid)
    assert train
    assert valid


@given(ids, shares, st.randoms())
def test_by_hash_a_row_keeps_its_side_when_others_are_moved(ids, share, random):
    _, valid = split.by_hash(ids, valid_fraction=share)
    shuffled = random.sample(ids, len(ids))
    _, again = split.by_hash(shuffled, valid_fraction=share)
    assert {ids[i] for i in valid} == {shuffled[i] for i in again}


def test_by_hash_gives_the_share_and_the_same_rows_everywhere():
    ids = [f"row:{number}" for number in range(10_000)]
    train, valid = split.by_hash(ids, valid_fraction=0.1)
    assert 900 < len(valid) < 1100
    assert valid[:5] == VALID_OF_TEN_THOUSAND
    more, _ = split.by_hash([*ids, "new"], valid_fraction=0.1)
    assert [i for i in more if i < 10_000] == train


VALID_OF_TEN_THOUSAND = [0, 3, 5, 16, 31]  # recorded: a changed hash would move rows between the sides of finished runs


@given(st.integers(2, 50), st.data())
def test_by_order_training_rows_come_first_and_validation_rows_follow(num_rows, data):
    num_train = data.draw(st.integers(1, num_rows - 1))
    num_valid = data.draw(st.integers(1, num_rows - num_train))
    train, valid = split.by_order(num_rows, train_rows=num_train, valid_rows=num_valid)
    assert [*train, *valid] == list(range(num_train + num_valid))
    assert len(train) == num_train
    rest = split.by_order(num_rows, train_rows=num_train, valid_rows=None)
    assert [*rest[0], *rest[1]] == list(range(num_rows))
    last = split.by_order(num_rows, train_rows=None, valid_rows=num_valid)
    assert [*last[0], *last[1]] == list(range(num_rows))
    assert len(last[1]) == num_valid


@pytest.mark.parametrize(
    ("train", "valid"), [(8, 3), (10, None), (None, 10), (0, 5), (5, 0), (-1, 3), (11, None)], ids=str
)
def test_more_rows_than_there_are_is_refused_with_their_number(train, valid):
    with pytest.raises(ValueError, match="there are 10 rows"):
        split.by_order(10, train_rows=train, valid_rows=valid)


def test_a_split_needs_a_rule_and_two_rows():
    with pytest.raises(ValueError, match=r"task\.valid_rows, task\.valid_fraction or task\.source\.valid_path"):
        split.by_order(10, train_rows=None, valid_rows=None)
    with pytest.raises(ValueError, match="at least 2 rows, there are 1"):
        split.by_hash(["a"], valid_fraction=0.5)
    for share in (0, 1, -0.1, 2.0, float("nan")):
        with pytest.raises(ValueError, match="between 0 and 1"):
            split.by_hash(["a", "b"], valid_fraction=share)


@pytest.mark.parametrize("num_rows", [0, 4, -1])
def test_first_refuses_what_is_not_there(num_rows):
    assert split.first("abc", 2, key="train_rows") == "ab"
    assert split.first("abc", None, key="train_rows") == "abc"
    with pytest.raises(ValueError, match=f"task.train_rows={num_rows} does not fit: there are 3"):
        split.first("abc", num_rows, key="train_rows")
