import hashlib
import itertools

from finetune.data import clinic, corpus

DOCUMENTS = list(itertools.islice(corpus.documents(), 6000))


def test_the_same_seed_gives_the_same_text():
    assert list(itertools.islice(corpus.documents(), 50)) == DOCUMENTS[:50]
    assert list(itertools.islice(corpus.documents(seed=1), 50)) != DOCUMENTS[:50]


def test_the_text_is_that_of_this_version():
    digest = hashlib.sha256("\n".join(DOCUMENTS[:200]).encode()).hexdigest()[:12]
    assert (corpus.VERSION, digest) == (1, "18f9d1c1f370"), "the text changed: raise VERSION, measure the bases again"


def test_every_character_of_the_demo_task_occurs():
    demo = "".join(row["input"] + row["target"] for row in clinic.read())
    assert not set(demo) - set("".join(DOCUMENTS))


def test_the_demo_task_itself_does_not_occur():
    firsts = {line for row in clinic.read() for line in (row["input"].split("\n")[0], row["target"].split("\n")[0])}
    leads = {line for line in firsts if line.endswith("：")}
    assert len(leads) == 5
    assert not [lead for lead in leads if any(lead in text for text in DOCUMENTS)]


def test_words_are_cut_and_nothing_is_lost():
    text = "患者：发热三天了，\n吃感冒灵。"
    assert corpus.words(text) == ["患者", "：", "发热", "三天", "了", "，", "\n", "吃", "感冒灵", "。"]
