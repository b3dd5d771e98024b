"""References are counted while answers are generated, and nobody waits for that."""

import threading

import pytest

from finetune import answers
from finetune.scores.conventions import count_reference


class Slow:
    """Counts nothing before it may."""

    def __init__(self):
        self.said, self.begun, self.free = [], threading.Event(), threading.Event()

    def __call__(self, text):
        self.said.append(text)
        self.begun.set()
        assert self.free.wait(60)

    def cache_info(self):
        return count_reference.cache_info()


def test_what_is_not_counted_when_the_answers_are_there_is_left(monkeypatch):
    slow = Slow()
    monkeypatch.setattr(answers, "count_reference", slow)

    def interrupted():
        with answers._counting([str(n) for n in range(100)]):
            assert slow.begun.wait(60)  # beside us
            threading.Timer(0.1, slow.free.set).start()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert slow.said in (["0"], ["0", "1"])


def test_scores_find_the_references_counted(monkeypatch):
    texts, counted = ["患者头痛三天", "建议多喝温水", "未见明显异常"], threading.Semaphore(0)

    def count(text):
        count_reference(text)
        counted.release()

    count.cache_info = count_reference.cache_info
    monkeypatch.setattr(answers, "count_reference", count)
    count_reference.cache_clear()
    with answers._counting(texts):
        assert all(counted.acquire(timeout=60) for _ in texts)
    before = count_reference.cache_info()
    for text in texts:
        count_reference(text)
    assert count_reference.cache_info().hits == before.hits + len(texts)


def test_no_more_are_counted_than_are_kept(monkeypatch):
    slow = Slow()
    slow.free.set()
    slow.cache_info = lambda: count_reference.cache_info()._replace(maxsize=3)
    monkeypatch.setattr(answers, "count_reference", slow)
    with answers._counting([str(n) for n in range(9)]):
        while len(slow.said) < 3:
            assert slow.begun.wait(60)
    assert slow.said == ["0", "1", "2"]
