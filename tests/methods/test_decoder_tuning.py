import random
from types import SimpleNamespace

import pytest
import torch
from conftest import ARCHITECTURES, tiny_base

from finetune.data.rows import Row
from finetune.methods.decoder_tuning import DecoderTuning, _query

CHOICES = ("甲乙", "甲丙", "丁")  # two share their first token
IDS = {"甲": 5, "乙": 6, "丙": 7, "丁": 8, "无": 9}


def encode(rows):
    """Each character of a prompt by its code, each of a choice by its id, and the end."""
    return [
        SimpleNamespace(ids=[3, *(10 + ord(c) % 80 for c in row.prompt), *(IDS[c] for c in row.target), 2],
                        num_prompt=1 + len(row.prompt))
        for row in rows
    ]  # fmt: skip


def rows(count, *, seed=0):
    """The last letter of the prompt tells the answer; one in ten is answered outside of its choices."""
    draw = random.Random(seed)
    found = []
    for n in range(count):
        target = draw.choice((*CHOICES, "无")) if n % 10 == 0 else draw.choice(CHOICES)
        prompt = "".join(draw.choices("xyz", k=3)) + "abcd"[(*CHOICES, "无").index(target)]
        found.append(Row(f"r{n}", "A", "cls", prompt, target, choices=CHOICES))
    return found


def fitted(architecture="qwen2", **options):
    method = DecoderTuning(**{"size": 16, "epochs": 200, "weight": None} | options)
    torch.manual_seed(0)
    model = method.attach(tiny_base(architecture), tokenizer=None, num_steps=0, train_rows=())
    count = method.fit(model, rows(120), encode=encode, lr=1e-2)
    return method, model, count


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_it_learns_to_choose(architecture):
    method, model, count = fitted(architecture)
    assert count == 32 * 16 + 4 * (16 + 1)  # width x size + labels x (size + 1)
    asked = rows(40, seed=1)
    right = [a == row.target for a, row in zip(method.predict(model, asked, encode=encode), asked, strict=True)]
    assert sum(right) > 32
    assert method.check(model).ok


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_choice_scores_what_a_pass_over_the_whole_of_it_says(architecture):
    model, prompt = tiny_base(architecture, seed=3), [3, 20, 30, 40]
    choices = [[5, 6, 2], [5, 7, 2], [8, 2]]
    hidden, scores = _query(model, prompt, choices)
    for choice, score in zip(choices, scores, strict=True):
        with torch.no_grad():
            found = model(input_ids=torch.tensor([prompt + choice]), output_hidden_states=True)
        logits = found.logits[0, len(prompt) - 1 : -1].log_softmax(dim=-1)
        expected = logits.gather(1, torch.tensor(choice)[:, None]).sum()
        torch.testing.assert_close(score, expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(hidden, found.hidden_states[-1][0, len(prompt) - 1], rtol=1e-4, atol=1e-4)


def test_the_base_is_only_asked():
    model = tiny_base("llama")
    before = {name: p.clone() for name, p in model.named_parameters()}
    passes = []
    model.register_forward_pre_hook(lambda *_: passes.append(1))
    method = DecoderTuning(size=4, epochs=2, weight=0.5)
    method.attach(model, tokenizer=None, num_steps=0, train_rows=())
    method.fit(model, rows(20), encode=encode, lr=1e-2)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert len(passes) == 2 * 20 + 2 * 4  # a row: its prompt, its choices; the same for each choice without a question


def test_a_head_that_is_read_back_answers_the_same(tmp_path):
    method, model, _ = fitted()
    method.save(model, tmp_path / "adapter")
    again = DecoderTuning(size=16, epochs=200, weight=None)
    fresh = again.load(tiny_base("qwen2"), tmp_path / "adapter")
    asked = rows(30, seed=2)
    assert again.predict(fresh, asked, encode=encode) == method.predict(model, asked, encode=encode)


def test_tasks_without_a_list_of_choices_are_named():
    free = [Row(f"f{n}", "B", "ner", "ab", "甲") for n in range(3)]
    listed = [Row(f"l{n}", "C", "ner", "ab", "甲乙，丁", choices=CHOICES) for n in range(3)]
    method = DecoderTuning(size=4, epochs=1, weight=None)
    assert method.unanswerable([*rows(20), *free, *listed]) == {
        "B": "needs a list of choices",
        "C": "needs a list of choices",
    }


def test_an_answer_is_a_candidate_of_its_row():
    method, model, _ = fitted()
    asked = [Row("v", "A", "cls", "axyz", "丁", choices=("丁", "甲丁"))]  # the second was never answered in training
    assert method.predict(model, asked, encode=encode)[0] in ("丁", "甲丁", "无")
    other = [Row("v", "Z", "cls", "axyz", "丁", choices=("丁", "甲丙"))]  # a task that training lacks
    assert method.predict(model, other, encode=encode)[0] in ("丁", "甲丙")
