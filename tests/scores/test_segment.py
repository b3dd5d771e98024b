import os
import random
import subprocess
import sys

import pytest

from finetune.scores import segment as module
from finetune.scores.segment import segment, words

PIECES = ["发热", "咳嗽三天", "CT", "B超", "37.5℃", "3-4天", "a_b", "AT&T", "c++", "℃", "，", "。", "\n", "\r\n", " ", "㐀", "①",
          "乒乓球拍卖完了", "小明硕士毕业于中国科学院", "常在某特殊年龄段起病", "阿莫西林", "γ", "1", "x", "我", "亇"]  # fmt: skip


def random_texts(*, num_texts, seed):
    dice = random.Random(seed)
    ideographs = [chr(code) for code in range(0x4E00, 0x9FA5)]
    for _ in range(num_texts):
        pieces = [
            dice.choice([*PIECES, dice.choice(ideographs), dice.choice(ideographs)]) for _ in range(dice.randint(1, 30))
        ]
        yield "".join(pieces)


@pytest.mark.parametrize("with_lookup", [True, False], ids=["rjieba", "jieba alone"])
def test_words_are_those_of_jieba(with_lookup, monkeypatch):
    if with_lookup:
        pytest.importorskip("rjieba")
    else:
        monkeypatch.setattr(module, "_lookup", lambda: None)
    module._clause_words.cache_clear()
    tokenizer = module._segmenter()
    for text in random_texts(num_texts=1500, seed=1):
        assert segment(text) == tokenizer.lcut(text)
    module._clause_words.cache_clear()


def test_nothing_is_lost_but_white_space():
    text = " 患者 发热\n\n咳嗽，3.5天 CT\t"
    assert "".join(segment(text)) == text
    assert "".join(words(text)) == "患者发热咳嗽，3.5天CT"


def test_quiet_and_cached_in_the_persons_own_folder(tmp_path):
    temporary, own = tmp_path / "tmp", tmp_path / "cache"
    temporary.mkdir()
    environment = {**os.environ, "TMPDIR": str(temporary), "XDG_CACHE_HOME": str(own)}
    code = "import finetune.scores.segment as t, sys; assert 'jieba' not in sys.modules; t.words('患者发热')"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout + done.stderr == ""
    assert [path.name for path in own.rglob("*.cache")] == ["jieba.cache"]
    assert list(temporary.iterdir()) == []


def test_words_added_to_jieba_elsewhere_change_nothing():
    import jieba

    before = words("患者头痛三天")
    jieba.add_word("患者头痛三天")
    assert words("患者头痛三天") == before
