import pytest

from finetune.scores import choices

RELEVANT = ("相关", "不相关")


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("相关", "相关"),
        ("答案：不相关。", "不相关"),
        ("相关，不相关", None),
        ("不知道", None),
        ("", None),
        ("属于非上述类型", "非上述类型"),
    ],
)
def test_the_choice_that_can_be_read(answer, expected):
    assert choices.read_choice(answer, choices=RELEVANT) == expected


# references a a a b b c, answers a a b b x c: a 2/2/3 (right/predicted/expected), b 1/2/2, c 1/1/1, x 0/1/0
ANSWERS, REFERENCES = list("aabbxc"), list("aaabbc")


def test_scores_by_hand():
    assert choices.accuracy(ANSWERS, references=REFERENCES) == pytest.approx(66.666667)
    assert choices.f1_macro(ANSWERS, references=REFERENCES) == pytest.approx((80 + 50 + 100 + 0) / 4)
    assert choices.f1_weighted(ANSWERS, references=REFERENCES) == pytest.approx((3 * 80 + 2 * 50 + 100) / 6)
    labels = [{"a", "b", "c"}] * 6
    assert choices.f1_micro(ANSWERS, references=REFERENCES, labels=labels) == pytest.approx(200 * 4 / (5 + 6))


def test_micro_f1_is_accuracy_when_every_answer_is_a_label():
    answers, labels = list("aabbac"), [{"a", "b", "c"}] * 6
    micro = choices.f1_micro(answers, references=REFERENCES, labels=labels)
    assert micro == pytest.approx(choices.accuracy(answers, references=REFERENCES))


def test_no_rows():
    assert choices.accuracy([], references=[]) == choices.f1_macro([], references=[]) == 0
    assert choices.f1_weighted([], references=[]) == choices.f1_micro([], references=[], labels=[]) == 0
