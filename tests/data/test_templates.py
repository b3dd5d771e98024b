import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune.data import templates


def fill(template, values, *, name="prompt", present=None):
    parsed = templates.parse(template, name=name)
    keys = set(values) if present is None else present
    return templates.fill(templates.settle(parsed, keys, where="f:1", name=name), values, name=name)


@pytest.mark.parametrize(
    ("template", "values", "text"),
    [
        ("{ask}", {"ask": "头痛？"}, "头痛？"),
        ("问：{ask}\n答：", {"ask": "头痛？"}, "问：头痛？\n答："),
        ("{a}{b}", {"a": "1", "b": "2"}, "12"),
        ("{{{a}}}", {"a": "1"}, "{1}"),
        ("plain", {"a": "1"}, "plain"),
        ("{问 题}", {"问 题": "1"}, "1"),
        ("{a}\n{b?}", {"a": "1", "b": "2"}, "1\n2"),
        ("{a}\n{b?}", {"a": "1", "b": ""}, "1"),
        ("{a}\n{b?}", {"a": "1", "b": None}, "1"),
        ("{a}\n{b?}", {"a": "1"}, "1"),
        ("{a}\n补充：{b?}\n答：", {"a": "1"}, "1\n答："),
        ("{b?}", {"a": "1"}, ""),
        ("{a}\n\n{c}", {"a": "1", "c": "2"}, "1\n\n2"),
        ("{x|a}", {"a": "1"}, "1"),
        ("{x|a?}", {"a": "1"}, "1"),
    ],
)
def test_a_template_is_filled(template, values, text):
    assert fill(template, values) == text


@given(st.dictionaries(st.sampled_from("abc"), st.text(), min_size=3))
def test_values_are_inserted_as_they_are(values):
    assert fill("{a}|{b}\n{c}", values) == f"{values['a']}|{values['b']}\n{values['c']}"


@pytest.mark.parametrize(
    "template",
    [
        "{a.__class__}",
        "{a[0]}",
        "{a!r}",
        "{a:>10}",
        "{a:{b}}",
        "{}",
        "{a",
        "a}",
        "{ }",
        "{|}",
        "{a|}",
        "{a??}",
        3,
        ["{a}"],
    ],
    ids=str,
)
def test_a_template_reaches_nothing_but_keys(template):
    with pytest.raises(ValueError, match=r"^task\.fields\.prompt"):
        templates.parse(template, name="prompt")


@pytest.mark.parametrize(
    ("template", "present", "message"),
    [
        (
            "{aks}",
            {"ask", "answer"},
            "f:1: no key 'aks' for task.fields.prompt; did you mean 'ask'? (there are answer, ask)",
        ),
        ("{output|target}", {"ask"}, "no key 'output' or 'target'"),
        ("{output|target}", {"output", "target"}, "both 'output' and 'target' occur"),
        ("{history?}", {"histroy"}, "did you mean 'histroy'?"),
    ],
)
def test_a_key_that_the_file_lacks_is_named_with_the_near_miss(template, present, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        fill(template, {}, present=present)


@pytest.mark.parametrize(
    ("value", "message"),
    [(3, "must be text, found int"), ([], "found list"), (True, "found bool"), (1.5, "found float")],
    ids=str,
)
def test_a_value_that_is_not_text_is_refused(value, message):
    with pytest.raises(ValueError, match=f"key 'a' {message}|{message}"):
        fill("{a}", {"a": value})


def test_a_row_that_lacks_a_key_of_its_file_is_refused():
    with pytest.raises(ValueError, match="no key 'ask'"):
        fill("{ask}", {"answer": "1"}, present={"ask", "answer"})


def test_an_id_may_be_a_whole_number_and_null_only_stands_for_an_empty_prompt_or_target():
    assert fill("{n}", {"n": 7}, name="id") == "7"
    assert fill("{n}", {"n": None}, name="target") == ""
    for name in ("id", "task", "kind"):
        with pytest.raises(ValueError, match="found null"):
            fill("{n}", {"n": None}, name=name)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (["是的", "不是"], ["是的", "不是"]),
        ("['是的', '不是']", ["是的", "不是"]),
        ('["是的", "不是"]', ["是的", "不是"]),
        (None, []),
        ("None", []),
        ("null", []),
        ("", []),
        ([], []),
    ],
    ids=str,
)
def test_a_list_may_be_written_as_text(value, expected):
    parsed = templates.parse("choices", name="choices")
    assert templates.listed(parsed, {"choices": value}) == expected


@pytest.mark.parametrize(
    "value",
    [3, {"a": 1}, "是的", "{'a': 1}", "__import__('os').getcwd()", "[" * 100_000, "['a'"],
    ids=lambda v: str(v)[:20],
)
def test_what_is_not_a_list_is_refused(value):
    with pytest.raises(ValueError, match="key 'choices' must be a list"):
        templates.listed(templates.parse("choices", name="choices"), {"choices": value})


def test_all_problems_of_the_fields_are_named_together():
    found = templates.problems({"promt": "{a}", "task": "t", "kind": "{k", "target": "{a!r}", "choices": "{c}"})
    assert len(found) == 5
    assert found[0] == "task.fields.promt is not a field; did you mean 'prompt'?"
    assert templates.problems({"task": "t", "kind": "k", "prompt": "{a}", "target": "{b}", "id": None}) == []
