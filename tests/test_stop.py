import os
import signal

import pytest

from finetune.stop import Stop, Stopped


@pytest.fixture
def stop():
    """A listening stop; the test's own handlers come back."""
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGALRM)
    before = {number: signal.getsignal(number) for number in numbers}
    found = Stop()
    found.listen()
    yield found
    signal.setitimer(signal.ITIMER_REAL, 0)
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1], ids=lambda number: number.name)
def test_a_request_waits_for_a_good_moment(number, stop):
    reached = []

    def work():
        with stop.held():
            os.kill(os.getpid(), number)
            reached.append("the end of the step")
            stop.heed()
            reached.append("the next step")

    with pytest.raises(Stopped):
        work()
    assert reached == ["the end of the step"]


def test_elsewhere_it_ends_at_once(stop):
    with pytest.raises(Stopped):
        os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(Stopped), stop.held():
        pytest.fail("nothing new is begun")


def test_patience_has_an_end(stop, monkeypatch):
    def work():
        with stop.held():
            os.kill(os.getpid(), signal.SIGTERM)
            signal.pause()

    monkeypatch.setattr("finetune.stop.PATIENCE", 0.05)
    with pytest.raises(Stopped):
        work()


def test_nobody_asked(stop):
    with stop.held():
        stop.heed()
