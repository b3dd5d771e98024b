import os
import subprocess
import sys

from finetune.scores.segment import segment, words


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
