from dataclasses import replace

import pytest

from finetune.data.rows import Row
from finetune.methods.few_shot import FewShot

TRAIN = [
    Row(f"t{n}", task, kind, f"{task} 问{n}", f"答{n}") for n in range(6) for task, kind in (("A", "cls"), ("B", "ner"))
]
VALID = [Row("v0", "A", "cls", "问", "答"), Row("v1", "B", "ner", "问", "答", history=(("早", "好"),))]


def ask(rows=VALID, *, k=3, seed=0, fits=lambda row: True):
    method = FewShot(k=k, seed=seed)
    return method, method.rows(rows, TRAIN, fits=fits)


def test_examples_are_training_rows_of_the_same_task():
    _, found = ask()
    for old, new in zip(VALID, found, strict=True):
        examples = new.history[: len(new.history) - len(old.history)]
        assert len(set(examples)) == 3
        assert set(examples) <= {(row.prompt, row.target) for row in TRAIN if row.task == old.task}
        assert replace(new, history=old.history) == old
        assert new.history[3:] == old.history


def test_the_seed_alone_draws_them():
    assert ask()[1] == ask()[1]
    assert ask(VALID[:1])[1] == ask()[1][:1]
    assert ask(seed=1)[1] != ask()[1]


@pytest.mark.parametrize("room", [0, 1, 2, 3, 9])
def test_as_many_examples_as_fit(room):
    method, found = ask(fits=lambda row: len(row.history) <= room)
    assert [len(row.history) for row in found] == [min(3, room), max(1, min(4, room))]
    given = min(3, room) + max(0, min(3, room - 1))
    assert method.notes() == {"examples": given, "rows_with_fewer_examples": (room < 3) + (room < 4)}


def test_fewer_examples_are_the_last_ones():
    _, [row] = ask(VALID[:1])
    _, [short] = ask(VALID[:1], fits=lambda row: len(row.history) <= 2)
    assert short.history == row.history[1:]


def test_a_task_that_training_lacks_gets_its_kind():
    _, [row] = ask([Row("v", "C", "ner", "问", "答")])
    assert all(question.startswith("B") for question, _ in row.history)
    assert ask([Row("v", "C", "dialogue", "问", "答")])[1][0].history == ()
