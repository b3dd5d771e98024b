"""Scores of any two texts."""

import math

from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.scores import aggregate, score_row

KINDS = [
    "ner", "spo_generation", "event_extraction", "normalization", "attr_cls", "cls", "matching", "response_generation",
    "report_generation", "dialogue", "instruction", "of a stranger",
]  # fmt: skip
words = st.sampled_from(
    ["上述句子中的实体包含：\n", "疾病实体：", "肺炎", "，", "发热", "。", "\n", " ", "a b", "<script>", "|", "主诉："]
)
texts = st.lists(words, max_size=12).map("".join) | st.text(max_size=30)
rows = st.fixed_dictionaries(
    {
        "id": st.just("1"),
        "task": st.sampled_from(["A", "B"]),
        "kind": st.sampled_from(KINDS),
        "prompt": texts,
        "template": st.just(0),
        "choices": st.none() | st.lists(texts.filter(str.strip), min_size=1, max_size=3),
        "reference": texts,
        "prediction": texts,
        "finish_reason": st.sampled_from(["stop", "length"]),
    }
)
LAWS = settings(deadline=None, max_examples=80)


def numbers(node):
    if isinstance(node, dict):
        for value in node.values():
            yield from numbers(value)
    elif isinstance(node, float):
        yield node


@LAWS
@given(rows)
def test_every_text_has_finite_scores(row):
    found = score_row(row)
    assert all(math.isfinite(number) for number in numbers(found))
    assert all(0 <= found[key] <= 100 + 1e-9 for key in found if key.startswith("rouge"))


@LAWS
@given(rows)
def test_the_reference_itself_is_the_best_answer(row):
    same, found = (score_row(row | {"prediction": text}) for text in (row["reference"], row["prediction"]))
    assert same["exact"] == 100
    for key in (key for key in same if key.startswith("rouge")):
        assert same[key] >= found[key] - 1e-9


@settings(deadline=None, max_examples=20)
@given(st.lists(rows, min_size=1, max_size=5))
def test_means_are_finite_and_follow_no_order(lines):
    lines = [line | {"kind": {"A": "ner", "B": "cls"}[line["task"]]} for line in lines]  # a task has one kind
    means = [aggregate(some)["mean"] for some in (lines, lines[::-1])]
    assert means[0].keys() == means[1].keys()
    assert all(math.isfinite(number) for number in numbers(means[0]))
    assert all(math.isclose(means[0][key], means[1][key], abs_tol=1e-9) for key in means[0] if "rouge" in key)
