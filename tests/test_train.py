"""What a job asks of its parts."""

from types import SimpleNamespace

import pytest

from finetune import train


class Told(Exception):
    """What a training was told, by name."""


@pytest.mark.parametrize(("launch", "alike"), [({"alike": 3}, 3), ({"alike": None}, 1), ({}, 1)])
def test_a_training_is_told_how_its_steps_are_run(monkeypatch, launch, alike):
    def loop(*given, **more):
        raise Told(given[-1], more)

    monkeypatch.setattr(train, "Loop", loop)
    monkeypatch.setattr(train, "refuse_small_disk", lambda *_: None)
    config = {"scale": "tiny", "method": {"name": "lora", "lr": {"tiny": 1e-3}}, "optim": {"lr": 1e-3}}
    parts = {"run": None, "method": None, "accelerator": None, "feeder": None, "train_rows": []}
    job = SimpleNamespace(
        **parts, split=SimpleNamespace(train=[]), config=config | {"launch": {"step": "graph"} | launch}
    )
    with pytest.raises(Told) as told:
        train._tune(job, None, [[0]], None, None)
    assert told.value.args == ("graph", {"alike": alike})
