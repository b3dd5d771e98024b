import pytest

from finetune.scores import health


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        pytest.param("患者" + "好" * 20, 100, id="one character, twenty times"),
        pytest.param("好" * 19, 0, id="nineteen characters are too few"),
        pytest.param("建议多休息，多喝水。" * 3, 100, id="a sentence three times"),
        pytest.param("建议多休息，多喝水。" * 2 + "建议多", 0, id="twice and a bit may be meant"),
        pytest.param("诊断：" + "感冒，发热，" * 6 + "感冒，发", 100, id="cut off within the unit"),
        pytest.param("感冒，" * 9 + "建议住院。", 0, id="it came out of the loop"),
        pytest.param("一二三四五六七八九十甲乙丙丁戊己庚辛壬癸", 0, id="no repetition"),
        pytest.param("发热：有\n咳嗽：无\n头痛：有\n流涕：无\n腹泻：无", 0, id="a list"),
        pytest.param("无。\n" * 20, 100, id="white space at the end is no part of it"),
        pytest.param("", 0, id="empty"),
    ],
)
def test_looping(text, expected):
    assert health.looping(text) == expected


def test_looping_on_a_long_text_ends():
    assert health.looping("ab" * 5000 + "c") == 0


def test_flags_are_percentages():
    assert (health.never_stopped("length"), health.never_stopped("stop")) == (100, 0)
    assert (health.empty(" \n"), health.empty("无")) == (100, 0)
    assert (health.exact("是的 ", "是的"), health.exact("是", "是的")) == (100, 0)


@pytest.mark.parametrize(
    ("prediction", "reference", "expected"),
    [
        ("多喝水", "多休息", 0),
        ("drink water", "多休息", 100),
        ("多喝 water", "多休息", 100 * 5 / 7),
        ("37.5，！", "多休息", 0),
        ("drink water", "rest", None),
        ("多喝水", "12", None),
    ],
)
def test_not_chinese_where_the_reference_is(prediction, reference, expected):
    assert health.not_chinese(prediction, reference) == (None if expected is None else pytest.approx(expected))


def test_length_is_of_all_rows_together():
    assert health.length(["多喝水", ""], references=["多休息", "好"]) == 75
    assert health.length([], references=[]) == 0


def test_a_loop_that_the_limit_cuts_within_a_character_is_one():
    assert health.looping("您好，" + "胃胀病情很严重，" * 8 + "胃\ufffd") == 100.0
    assert health.looping("您好，我胃胀，吃了药也没有用，病情很严重，请问怎么办才好呢\ufffd") == 0.0
