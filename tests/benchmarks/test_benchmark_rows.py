import json

import pytest
import torch

from benchmarks.answers import answers, as_given
from benchmarks.rows import END, MOST, rows, write
from benchmarks.shapes import TEMPLATE, base, tokenizer
from finetune.data.rows import Row
from finetune.evaluate import Decoding, predict
from finetune.models.tokenizer import encode_rows

SIZE = 512


def test_the_rows_are_as_long_as_those_of_the_tasks():
    found = rows(4000, vocab_size=SIZE)
    tokens = sum(len(row.ids) for row in found)
    assert tokens / len(found) == pytest.approx(240, abs=3)
    assert sum(row.num_answer for row in found) / tokens == pytest.approx(0.15, abs=0.01)
    assert max(row.num_answer for row in found) <= MOST
    assert all(row.ids[-1] == END and END not in row.ids[:-1] for row in found)


def test_words_become_the_same_tokens(tmp_path):
    asked = rows(20, vocab_size=SIZE, announced=True)
    words = tokenizer(SIZE)
    words.chat_template = TEMPLATE
    lines = [json.loads(line) for line in write(tmp_path / "rows.jsonl", asked).read_text().splitlines()]
    texts = [Row(line["id"], "t", "instruction", line["prompt"], line["target"]) for line in lines]
    found = encode_rows(texts, words, max_prompt_tokens=1077, max_target_tokens=MOST)
    assert [(e.ids, e.num_prompt) for e in found] == [(row.ids, row.num_prompt) for row in asked]


@pytest.mark.parametrize("who", ["generate in batches of 8", "this project"])
def test_answers_have_the_announced_lengths(who):
    network, asked = base("tiny", dtype=torch.float32).eval(), rows(24, vocab_size=SIZE, announced=True)
    if who == "this project":
        prompts = [row.ids[: row.num_prompt] for row in asked]
        found = {a.number: a.ids for b in predict(network, prompts, Decoding(MOST, 16, (END,), 0)) for a in b}
        said = [found[number] for number in range(len(asked))]
    else:
        said = answers(network, asked)
    assert as_given(said, asked) == 1
