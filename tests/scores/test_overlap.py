"""BLEU-4 and chrF against sacrebleu, and the corners where a corpus score is undefined."""

import random

import pytest

from finetune.scores.overlap import bleu_and_chrf, count_overlap, mteval_words

PIECES = [
    "发热",
    "咳嗽",
    "无",
    "。",
    "，",
    "37.5",
    "3-4",
    "a-b",
    "(1)",
    "CT",
    "x,y",
    "1,000",
    "…",
    "“",
    "\n",
    " ",
    "e.g.",
    "℃",
    "①",
    "%",
    "~",
]


def random_texts(*, num_texts, seed, longest=20):
    dice = random.Random(seed)
    return ["".join(dice.choice(PIECES) for _ in range(dice.randint(0, longest))) for _ in range(num_texts)]


@pytest.mark.parametrize("longest", [1, 3, 20, 200])
def test_equal_to_sacrebleu(longest):
    predictions, references = (random_texts(num_texts=200, seed=seed, longest=longest) for seed in (1, 2))
    predictions[0], references[1] = "", ""
    check(predictions, references)


@pytest.mark.parametrize(
    ("predictions", "references"),
    [
        pytest.param(["发热"], ["发热"], id="shorter than four"),
        pytest.param(["", ""], ["发热", "咳嗽"], id="all empty"),
        pytest.param(["发热咳嗽头痛"], ["无异常，不用管"], id="nothing shared"),
        pytest.param(["患者发热三天", ""], ["患者发热三天", "咳嗽"], id="half empty"),
        pytest.param(["一二三四五六"], ["一x二y三z四"], id="only single characters shared"),
        pytest.param(["the cat sat on the mat"], ["the cat sat on a mat"], id="English"),
    ],
)
def test_corners(predictions, references):
    check(predictions, references)


def check(predictions, references):
    metrics = pytest.importorskip("sacrebleu.metrics")
    found = bleu_and_chrf(map(count_overlap, predictions, references))
    assert found["bleu-4"] == pytest.approx(
        metrics.BLEU(tokenize="zh", force=True).corpus_score(predictions, [references]).score, abs=1e-6
    )
    assert found["chrf"] == pytest.approx(metrics.CHRF().corpus_score(predictions, [references]).score, abs=1e-6)


def test_words_equal_sacrebleus_tokens():
    tokenizer = pytest.importorskip("sacrebleu.tokenizers.tokenizer_zh").TokenizerZh()
    dice = random.Random(3)
    texts = random_texts(num_texts=1000, seed=4)
    texts += [
        "".join(chr(dice.choice([dice.randrange(32, 127), dice.randrange(0x2000, 0x33FF)])) for _ in range(20))
        for _ in range(1000)
    ]
    for text in texts:
        assert mteval_words(text) == tokenizer(text.rstrip()).split()


def test_no_rows():
    assert bleu_and_chrf([]) == {"bleu-4": 0, "chrf": 0}


def test_identical_texts_score_all():
    texts = ["患者发热三天", "无咳嗽，无腹泻。"]
    assert bleu_and_chrf(map(count_overlap, texts, texts)) == pytest.approx({"bleu-4": 100, "chrf": 100})
