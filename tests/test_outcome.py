import json

import pytest

from finetune.outcome import finite, losses


def test_what_is_no_number_is_null():
    value = {"a": [float("nan"), (1.0, float("inf"))], "b": {"c": float("-inf"), "d": "nan"}, "e": True}
    assert finite(value) == {"a": [None, [1.0, None]], "b": {"c": None, "d": "nan"}, "e": True}
    json.dumps(finite(value), allow_nan=False)


def test_losses_leave_out_what_is_no_number():
    lines = [{"step": n, "loss": loss} for n, loss in enumerate([2.0, None, 1.0], start=1)]
    lines[1]["valid_loss"], lines[2]["valid_loss"] = 3.0, None
    assert losses(lines) == {"train": 1.5, "valid": 3.0, "best_valid": 3.0, "best_step": 2}
    assert losses([{"step": 1, "loss": None}]) == {}
    assert losses([]) == {}


@pytest.mark.parametrize("count", [1, 25])
def test_the_training_loss_is_of_the_last_twenty_steps(count):
    lines = [{"step": n, "loss": float(n)} for n in range(count)]
    assert losses(lines)["train"] == sum(range(max(0, count - 20), count)) / min(count, 20)
