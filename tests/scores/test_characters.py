import random

import pytest

from finetune.scores.characters import characters


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        pytest.param("患者发热，CT 正常。", "患 者 发 热 ， ct 正 常 。", id="Chinese and a word"),
        pytest.param("37.5℃ 120/80mmHg", "37 . 5℃ 120 / 80mmhg", id="numbers"),
        pytest.param("Café naïve", "cafe naive", id="accents"),
        pytest.param("a\x00b\u200bc\ufffd\t\n", "abc", id="control characters"),
        pytest.param("", "", id="empty"),
        pytest.param("……——“好”", "… … — — “ 好 ”", id="marks"),
    ],
)
def test_tokens(text, expected):
    assert characters(text) == expected.split()


def test_equal_to_berts_basic_tokenizer():
    module = pytest.importorskip("transformers.models.bert.tokenization_bert_legacy")
    tokenizer = module.BasicTokenizer(tokenize_chinese_chars=True)
    dice = random.Random(1)
    scripts = [(0x20, 0x7F), (0x4E00, 0x9FA5), (0x3000, 0x30FF), (0xFF00, 0xFFEF), (0xA0, 0x24F), (0x2000, 0x206F),
               (0x300, 0x36F), (0x370, 0x3FF), (0x3400, 0x3410), (0xF900, 0xFA00), (0x1F600, 0x1F610), (0, 0x20)]  # fmt: skip
    for _ in range(2000):
        chosen = dice.sample(scripts, 3)
        text = "".join(chr(dice.randrange(*dice.choice(chosen))) for _ in range(dice.randint(0, 30)))
        assert characters(text) == tokenizer.tokenize(text), repr(text)
