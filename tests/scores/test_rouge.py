"""ROUGE by hand, against `rouge_chinese` and `rouge_score`, and where the naive implementations break."""

import random

import pytest

from finetune.scores import rouge
from finetune.scores.conventions import rouge as rouge_of_texts
from finetune.scores.conventions import sentence_words
from finetune.scores.segment import words

THIRD, TWO_THIRDS = 33.333333333, 66.666666667
# prediction, reference, ROUGE-1/2/L by sets, by multisets; jieba's words are listed by `test_segmentation`
BY_HAND = {
    "identical": ("患者头痛三天", "患者头痛三天", (100, 100, 100), (100, 100, 100)),
    "beginning missing": ("头痛三天", "患者头痛三天", (80, TWO_THIRDS, 80), (80, TWO_THIRDS, 80)),
    "clauses swapped": ("咳嗽两天，患者发热。", "患者发热，咳嗽两天。", (100, 40, 50), (100, 40, 50)),
    "no word shared": ("今天天气很好", "明天天气不好", (0, 0, 0), (0, 0, 0)),
    "reference has no bigram": ("无发热", "发热", (TWO_THIRDS, 0, TWO_THIRDS), (TWO_THIRDS, 0, TWO_THIRDS)),
    "one word three times": ("感冒感冒感冒", "感冒", (100, 0, 50), (50, 0, 50)),
    "order reversed": ("北京天安门爱我", "我爱北京天安门", (100, THIRD, 50), (100, THIRD, 50)),
    "one word of two": ("建议多喝水", "建议多休息", (40, 0, 40), (40, 0, 40)),
    "a blank line is a word": (
        "诊断：肺炎\n\n建议：住院", "诊断：肺炎\n建议：住院",
        (90.909090909, 72.727272727, 92.307692308), (100, 100, 100),
    ),
    "last word differs": ("诊断：肺炎", "诊断：支气管炎", (TWO_THIRDS, 50, TWO_THIRDS), (TWO_THIRDS, 50, TWO_THIRDS)),
    "letter case differs": ("ct显示肺部阴影", "CT显示肺部阴影", (75, TWO_THIRDS, 75), (75, TWO_THIRDS, 75)),
    "numbers differ": ("血压130/85mmHg", "血压120/80mmHg", (50, 0, 50), (50, 0, 50)),
    "empty": ("", "发热", (0, 0, 0), (0, 0, 0)),
    "blank": (" \n ", "发热", (0, 0, 0), (0, 0, 0)),
    "punctuation missing": ("好的谢谢", "好的。谢谢！", (75, THIRD, 75), (75, THIRD, 75)),
    "words swapped": ("宝宝有痰咳嗽", "宝宝咳嗽有痰", (100, THIRD, 75), (100, THIRD, 75)),
    "reference eight times": ("发热，" * 8, "发热，", (100, TWO_THIRDS, 22.222222222), (22.222222222, 12.5, 22.222222222)),
    "middle missing": ("发热，发热", "发热，咳嗽，发热", (80, TWO_THIRDS, 75), (75, TWO_THIRDS, 75)),
    "half right": ("是的", "是", (TWO_THIRDS, 0, TWO_THIRDS), (TWO_THIRDS, 0, TWO_THIRDS)),
    "no Chinese": ("no fever", "fever and no cough", (TWO_THIRDS, 0, THIRD), (TWO_THIRDS, 0, THIRD)),
}  # fmt: skip
NAMES = ("rouge-1", "rouge-2", "rouge-l")


@pytest.mark.parametrize("case", BY_HAND)
def test_twenty_pairs_by_hand(case):
    prediction, reference, by_sets, by_multisets = BY_HAND[case]
    found = rouge_of_texts(prediction, reference)
    assert [found[name] for name in NAMES] == pytest.approx(by_sets, abs=1e-6)
    assert [found[f"{name}-multiset"] for name in NAMES] == pytest.approx(by_multisets, abs=1e-6)


@pytest.mark.parametrize(
    "expected",
    [
        "患者 头痛 三天",
        "今天天气 很 好",
        "无 发热",
        "建议 多喝水",
        "建议 多 休息",
        "血压 130 / 85mmHg",
        "好 的 。 谢谢 ！",
    ],
)
def test_segmentation(expected):
    assert words(expected.replace(" ", "")) == expected.split()


ALPHABET = [
    "发热",
    "咳嗽",
    "无",
    "。",
    "！",
    "？",
    "?",
    "”",
    "’",
    "，",
    "\n",
    "……",
    "......",
    "a?b",
    "。”好",
    "x",
    " ",
    "\u3000",
]


def random_pairs(*, num_pairs, seed):
    dice = random.Random(seed)

    def text():
        return [dice.choice(ALPHABET) for _ in range(dice.choice([1, 2, 5, 20, 60]))]

    return [(text(), text()) for _ in range(num_pairs)]


def sets(prediction, reference):
    return rouge.rouge_sets(rouge.count(sentence_words(prediction)), rouge.count(sentence_words(reference)))


def multisets(prediction, reference):
    return rouge.rouge_multisets(rouge.count(prediction), rouge.count(reference))


def test_sets_equal_rouge_chinese():
    scorer = pytest.importorskip("rouge_chinese").Rouge()
    num_compared = 0
    for prediction, reference in random_pairs(num_pairs=1000, seed=1):
        if not "".join(prediction).strip() or not "".join(reference).strip():
            continue  # it raises ValueError
        [theirs] = scorer.get_scores([" ".join(prediction)], [" ".join(reference)])
        assert sets(prediction, reference) == pytest.approx({n: 100 * theirs[n]["f"] for n in NAMES}, abs=1e-6)
        num_compared += 1
    assert num_compared > 900


def test_multisets_equal_rouge_score():
    rouge_scorer = pytest.importorskip("rouge_score.rouge_scorer")

    class Spaces:
        def tokenize(self, text):
            return text.split()

    scorer = rouge_scorer.RougeScorer(["rouge1", "rouge2", "rougeL"], tokenizer=Spaces())
    for prediction, reference in random_pairs(num_pairs=1000, seed=2):
        theirs = scorer.score(" ".join(reference), " ".join(prediction))
        ours = multisets(" ".join(prediction).split(), " ".join(reference).split())
        assert list(ours.values()) == pytest.approx([100 * score.fmeasure for score in theirs.values()], abs=1e-6)


@pytest.mark.parametrize("score", [sets, multisets])
def test_symmetric_bounded_and_all_for_itself(score):
    for prediction, reference in random_pairs(num_pairs=200, seed=3):
        visible = [token for token in reference if token.strip()] + ["发热", "无"]
        assert score(prediction, reference) == score(reference, prediction)
        assert all(0 <= value <= 100 for value in score(prediction, reference).values())
        assert set(score(visible, visible).values()) == {100.0}


def test_ten_thousand_tokens():
    dice = random.Random(4)
    long, other = ([dice.choice("发热咳嗽头痛无有") for _ in range(10_000)] for _ in range(2))
    assert sets(long, long)["rouge-l"] == 100
    assert 40 < multisets(long, other)["rouge-l"] < 80
    assert rouge_of_texts("".join(long), "".join(long))["rouge-l-char-multiset"] == 100


def test_longest_common_subsequence_equals_the_table():
    for left, right in random_pairs(num_pairs=300, seed=5):
        row = [0] * (len(right) + 1)
        for token in left:
            above = row[:]
            for column, other in enumerate(right):
                row[column + 1] = above[column] + 1 if token == other else max(above[column + 1], row[column])
        found = rouge.rouge_l(rouge.count(left), rouge.count(right))
        assert found == pytest.approx(200 * row[-1] / (len(left) + len(right)))


CLASSIC = {
    "reference eight times, words": ("发热，" * 8, "发热，", "", (100, 66.666667, 22.222222)),
    "reference eight times, characters": ("发热，" * 8, "发热，", "-char", (100, 80, 22.222222)),
    "reference eight times, character multisets": (
        "发热，" * 8,
        "发热，",
        "-char-multiset",
        (22.222222, 16, 22.222222),
    ),
    "characters know no words": ("天安门", "安天门", "-char", (100, 0, 66.666667)),
    "letters are lower-cased by character": ("CT显示", "ct显示", "-char", (100, 100, 100)),
    "and not by word": ("CT显示", "ct显示", "", (50, 0, 50)),
    "no Chinese": ("the cat", "a cat sat", "-char", (40, 0, 40)),
    "identical": ("诊断：肺炎\n\n建议：住院", "诊断：肺炎\n\n建议：住院", "", (100, 100, 100)),
}


@pytest.mark.parametrize("case", CLASSIC)
def test_conventions(case):
    prediction, reference, suffix, expected = CLASSIC[case]
    found = rouge_of_texts(prediction, reference)
    assert [found[name + suffix] for name in NAMES] == pytest.approx(expected, abs=1e-6)
