import hashlib
import json
import subprocess
import sys
from collections import Counter

import pytest

from finetune.data import clinic

ROWS = clinic.read(train_rows=600, valid_rows=150, seed=3)
BY_TASK = {task: [row for row in ROWS if row["task_dataset"] == task] for task in {r["task_dataset"] for r in ROWS}}


def body(row):
    """The sentence or the dialogue of a row: what lies between the instruction and the last two lines."""
    return "\n".join(row["input"].split("\n")[1:-2])


def test_the_same_seed_gives_the_same_rows():
    assert clinic.read(train_rows=600, valid_rows=150, seed=3) == ROWS


def test_another_seed_gives_other_rows():
    others = {body(row) for row in clinic.read(train_rows=600, valid_rows=150, seed=4)}
    assert len(others & {body(row) for row in ROWS}) < 40  # short dialogues may meet by chance


def test_rows_are_those_of_this_version():
    rows = clinic.read(train_rows=30, valid_rows=9)
    text = json.dumps([{k: v for k, v in row.items() if k != "reworded"} for row in rows], ensure_ascii=False)
    digest = hashlib.sha256(text.encode()).hexdigest()[:12]
    assert (clinic.VERSION, digest) == (1, "a8585219b748"), (
        "the rows changed: raise VERSION, rebuild the bases, measure again"
    )


def test_training_and_validation_share_no_sentence_and_no_dialogue():
    train, valid = ROWS[:600], ROWS[600:]
    assert not {body(row) for row in train} & {body(row) for row in valid}
    assert len({body(row) for row in ROWS}) == len(ROWS)


def test_validation_rows_do_not_depend_on_the_number_of_training_rows():
    fewer = clinic.read(train_rows=60, valid_rows=150, seed=3)
    assert fewer[60:] == ROWS[600:]
    assert fewer[:60] == ROWS[:60]


@pytest.mark.parametrize("part", [slice(0, 600), slice(600, 750)], ids=["train", "valid"])
def test_the_kinds_take_turns(part):
    assert set(Counter(row["task_type"] for row in ROWS[part]).values()) == {len(ROWS[part]) // 3}


def test_ids_are_unique():
    assert len({row["sample_id"] for row in ROWS}) == len(ROWS)


def test_an_intent_is_one_of_the_choices_or_none_of_them():
    for row in BY_TASK["CLINIC-INTENT"]:
        assert row["target"] in [*row["answer_choices"], clinic.NO_LABEL]
        assert f"选项：{'，'.join(row['answer_choices'])}\n" in row["input"]


def test_every_intent_and_none_occur():
    assert {row["target"] for row in BY_TASK["CLINIC-INTENT"]} == {*clinic.INTENTS, clinic.NO_LABEL}


def test_entities_stand_under_the_asked_types_and_in_the_sentence():
    for row in BY_TASK["CLINIC-NER"]:
        lead, *lines = row["target"].split("\n")
        assert lead == "上述句子中的实体包含："
        assert [line.split("实体：")[0] for line in lines] == row["answer_choices"]
        for line in lines:
            kind, mentions = line.split("实体：")
            for mention in filter(None, mentions.split("，")):
                assert mention in clinic.TYPES[kind]
                assert mention in body(row)


def test_no_entity_of_an_asked_type_is_left_out():
    every = [word for words in clinic.TYPES.values() for word in words]
    for row in BY_TASK["CLINIC-NER"]:
        for kind in row["answer_choices"]:
            line = next(line for line in row["target"].split("\n") if line.startswith(f"{kind}实体："))
            whole = [word for word in clinic.TYPES[kind] if sum(word in other for other in every) == 1]
            assert all(word in line for word in whole if word in body(row))  # 血压 also occurs in 高血压


def test_a_report_has_its_six_sections_in_order():
    for row in BY_TASK["CLINIC-REPORT"]:
        lead, *lines = row["target"].split("\n")
        assert lead == "上述问诊对话的诊疗报告如下："
        assert tuple(line.split("：")[0] for line in lines) == clinic.SECTIONS


def test_reading_needs_no_torch():
    code = "import sys; from finetune.data import clinic, corpus; clinic.read(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_every_row_can_be_asked_in_other_words():
    for row in ROWS:
        assert row["reworded"] != row["input"]
        assert body({"input": row["reworded"]}) == body(row)
        assert all(choice in row["reworded"] for choice in row["answer_choices"] or ())
