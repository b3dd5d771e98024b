import pytest

from benchmarks.formula import MEAN_TOKENS, grid_seconds, seconds


def line(*, names=("lora",), wall=50.0, tokens=100 * MEAN_TOKENS, rate=1000.0, answers=100, seconds_an_answer=0.1):
    cell = {
        "num_tokens": tokens,
        "tokens_per_second": rate,
        "answers": answers,
        "seconds_an_answer": seconds_an_answer,
    }
    return {"who": "x", "wall_seconds": wall, "cells": dict.fromkeys(names, cell)}


def test_a_cell_of_the_measured_size_takes_what_was_measured():
    assert seconds(line(), num_rows=100, epochs=1, answers=100) == pytest.approx(50)


def test_more_rows_cost_their_tokens_at_the_steady_rate():
    assert seconds(line(), num_rows=200, epochs=1, answers=100) == pytest.approx(50 + 100 * MEAN_TOKENS / 1000)


def test_more_answers_cost_what_each_took():
    assert seconds(line(), num_rows=100, epochs=1, answers=300) == pytest.approx(50 + 20)


def test_a_grid_measured_as_one_command_counts_its_start_once():
    names = ("lora", "qlora", "prefix", "prompt", "ptuning")
    sizes = {"num_rows": 200, "epochs": 1, "answers": 100}
    assert grid_seconds(line(names=names), **sizes) == pytest.approx(50 + 5 * 24)


def test_a_grid_of_single_cells_is_so_many_commands():
    assert grid_seconds(line(), num_rows=200, epochs=1, answers=100) == pytest.approx(5 * 74)


def test_other_numbers_of_cells_say_nothing_about_a_grid():
    with pytest.raises(ValueError, match="2 cells"):
        grid_seconds(line(names=("a", "b")))
