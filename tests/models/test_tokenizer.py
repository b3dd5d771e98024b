import random
import re

import pytest
import tokenizers
import transformers
from loopback import CONTROL, ENDS, TEMPLATES, make_tokenizer

from finetune.data.rows import Row
from finetune.models import tokenizer as subject

KINDS = tuple(TEMPLATES)
LIMITS = {"max_prompt_tokens": 400, "max_target_tokens": 100}


def row(prompt="头痛三天，怎么办？", target="建议先量血压。", history=(), name="a:1"):
    return Row(id=name, task="t", kind="dialogue", prompt=prompt, target=target, history=tuple(history))


def loaded(kind, tmp_path, **options):
    make_tokenizer(kind, **options).save_pretrained(tmp_path)
    return subject.load(tmp_path, eos_tokens=[ENDS[kind], "<|endoftext|>", "<|not-there|>"])


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture
def tokenizer(kind, tmp_path):
    return loaded(kind, tmp_path)


HISTORY = (("有发热吗？", "没有。"), ("hello", "world"))


def test_without_a_chat_template_the_prompt_is_the_documented_one(tmp_path):
    plain = loaded("plain", tmp_path)
    assert subject.render(row("问"), plain) == "用户：问\n助手："
    assert subject.render(row("问", history=[("早", "好")]), plain) == "用户：早\n助手：好</s>用户：问\n助手："
    assert subject.render(row("问"), plain, system="你是医生。") == "你是医生。\n用户：问\n助手："


@pytest.mark.parametrize("history", [(), HISTORY], ids=["one turn", "three turns"])
@pytest.mark.parametrize("kind", ["chatml", "glm", "dated"], indirect=True)
def test_the_prompt_is_what_the_template_writes_before_the_answer(tokenizer, history):
    example = row(history=history)
    messages = []
    for question, answer in (*history, (example.prompt, example.target)):
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    whole = tokenizer.apply_chat_template(messages, tokenize=False, date_string=subject.DATE)
    prompt = subject.render(example, tokenizer)
    assert whole.startswith(prompt + example.target)
    assert example.prompt in prompt


def test_a_template_that_asks_for_today_gets_a_fixed_date(tmp_path):
    assert "Today Date: 26 Jul 2024\n" in subject.render(row(), loaded("dated", tmp_path))


def test_a_system_text_goes_through_the_template(tmp_path):
    text = subject.render(row(), loaded("chatml", tmp_path), system="你是医生。")
    assert text.startswith("<|im_start|>system\n你是医生。<|im_end|>\n<|im_start|>user\n")


def test_plain_can_be_asked_for(tmp_path):
    make_tokenizer("chatml").save_pretrained(tmp_path)
    plain = subject.load(tmp_path, eos_tokens=["<|im_end|>"], template="plain")
    assert subject.render(row("问"), plain) == "用户：问\n助手："
    assert plain.eos_token == "</s>"


def test_a_row_is_its_prompt_then_its_answer_and_end(tokenizer, kind):
    example = subject.encode(row(), tokenizer, **LIMITS)
    prompt, answer = example.ids[: example.num_prompt], example.ids[example.num_prompt :]
    assert prompt == tokenizer(subject.render(row(), tokenizer), add_special_tokens=False).input_ids
    assert answer == [
        *tokenizer(row().target, add_special_tokens=False).input_ids,
        tokenizer.convert_tokens_to_ids(ENDS[kind]),
    ]
    assert not example.prompt_cut
    assert not example.target_cut


def test_many_rows_are_as_one_by_one(tokenizer):
    rows = [row(f"第{i}个问题" * (i % 7 + 1), "答" * i, HISTORY[: i % 3], name=f"a:{i}") for i in range(40)]
    rows[5] = row("<|im_end|> 头痛")
    limits = {"max_prompt_tokens": 90, "max_target_tokens": 30}
    together = subject.encode_rows(rows, tokenizer, **limits)
    assert together == [subject.encode(each, tokenizer, **limits) for each in rows]
    assert subject.encode_rows([], tokenizer, **limits) == []


def frame(ids, tokenizer):
    control = set(tokenizer.convert_tokens_to_ids(CONTROL))
    return [i for i in ids if i in control]


@pytest.mark.parametrize("spelled", [*CONTROL, "<|im_<|im_end|>end|>", "".join(CONTROL)])
@pytest.mark.parametrize("place", ["prompt", "target", "history"])
def test_text_of_the_data_never_becomes_a_control_token(tokenizer, spelled, place):
    text = f"头痛{spelled}\nhello {spelled}"
    harmless = {"prompt": "头痛", "target": "好", "history": (("早", "好"),)}
    written = {**harmless, place: ((text, text),) if place == "history" else text}
    before = subject.encode(row(**harmless), tokenizer, **LIMITS)
    after = subject.encode(row(**written), tokenizer, max_prompt_tokens=4000, max_target_tokens=4000)
    assert frame(after.ids, tokenizer) == frame(before.ids, tokenizer)
    part = slice(after.num_prompt, None) if place == "target" else slice(0, after.num_prompt)
    assert text in tokenizer.decode(after.ids[part])


def test_hiding_control_tokens_changes_nothing_else(tokenizer):
    spelled = subject.encode(row("头痛 </s> hello"), tokenizer, **LIMITS)
    pieces = tokenizer("</s>", add_special_tokens=False, split_special_tokens=True).input_ids
    text = subject.render(row("头痛 \U000f0000 hello"), tokenizer)
    before, after = (tokenizer(part, add_special_tokens=False).input_ids for part in text.split("\U000f0000"))
    # Byte-level BPE splits at `</`, so the three parts meet at the borders of its words.
    assert tokenizer.decode(spelled.ids[: spelled.num_prompt]) == tokenizer.decode([*before, *pieces, *after])


def test_private_characters_of_the_data_are_left_alone(tokenizer):
    text = "\U000f0000 </s> \U000f0001"
    example = subject.encode(row(text), tokenizer, **LIMITS)
    assert text in tokenizer.decode(example.ids)


@pytest.mark.parametrize("limit", [60, 61, 75, 120])
def test_a_long_question_loses_its_middle_and_the_template_stays_whole(tokenizer, limit):
    draw = random.Random(limit)
    words = "".join(draw.choice("头痛三天伴有恶心检查血压𠮷 a") for _ in range(300))
    example = subject.encode(row(f"开头{words}结尾"), tokenizer, max_prompt_tokens=limit, max_target_tokens=100)
    assert example.prompt_cut
    # The seam is a token or two short of the limit at the most, as characters are of up to four tokens.
    assert limit - 6 <= example.num_prompt <= limit
    text = tokenizer.decode(example.ids[: example.num_prompt])
    start, _, end = subject.render(row("#"), tokenizer).partition("#")
    assert text.startswith(f"{start}开头")
    assert text.endswith(f"结尾{end}")
    assert "�" not in text


def test_earlier_turns_go_first_and_the_oldest_of_them(tokenizer):
    history = [(f"问题{i}" * 5, f"回答{i}" * 5) for i in range(6)]
    whole = subject.encode(row(history=history), tokenizer, max_prompt_tokens=9999, max_target_tokens=100)
    cut = subject.encode(row(history=history), tokenizer, max_prompt_tokens=whole.num_prompt - 1, max_target_tokens=100)
    text = tokenizer.decode(cut.ids[: cut.num_prompt])
    assert cut.prompt_cut
    assert text == subject.render(row(history=history[1:]), tokenizer)


def test_a_limit_below_the_template_is_refused_with_the_row(tokenizer):
    with pytest.raises(ValueError, match=r"max_prompt_tokens is \d+ tokens too small .*row b:7"):
        subject.encode(row(name="b:7"), tokenizer, max_prompt_tokens=2, max_target_tokens=100)


def test_an_answer_that_is_cut_has_no_end(tokenizer):
    length = len(tokenizer(row().target, add_special_tokens=False).input_ids)
    fits, cut = (
        subject.encode(row(), tokenizer, max_prompt_tokens=400, max_target_tokens=limit)
        for limit in (length + 1, length)
    )
    assert fits.ids[-1] == tokenizer.eos_token_id
    assert not fits.target_cut
    assert cut.ids == fits.ids[:-1]
    assert cut.target_cut


def test_a_plain_prompt_begins_as_the_tokenizer_begins(tmp_path):
    with_start = loaded("plain", tmp_path / "bos", bos=True)
    ids = subject.encode(row(), with_start, **LIMITS).ids
    assert ids[0] == with_start.bos_token_id
    assert ids[1:] == subject.encode(row(), loaded("plain", tmp_path / "none"), **LIMITS).ids


def test_ends_are_those_of_the_model_file_the_tokenizer_and_the_weights(tmp_path):
    names = ["<|im_end|>", "<|not-there|>", "<|endoftext|>"]
    make_tokenizer("chatml").save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [7, 1]}')
    tokenizer = subject.load(tmp_path, eos_tokens=names)
    expected = [*tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"]), 7]
    assert subject.end_ids(tokenizer, folder=tmp_path, eos_tokens=names) == expected
    assert tokenizer.pad_token_id is not None


def test_a_base_without_any_end_is_refused(tmp_path):
    made = make_tokenizer()
    made.eos_token = None
    made.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"none of model.eos_tokens=\['<\|end\|>'\]"):
        subject.load(tmp_path, eos_tokens=["<|end|>"])


def test_an_end_that_is_registered_as_ordinary_text_is_made_a_control_token(tmp_path):
    made = make_tokenizer("chatml")
    made.add_tokens([tokenizers.AddedToken("<|turn|>", special=False)])
    made.save_pretrained(tmp_path)
    tokenizer = subject.load(tmp_path, eos_tokens=["<|turn|>"])
    example = subject.encode(row("a<|turn|>", "b<|turn|>"), tokenizer, **LIMITS)
    assert example.ids.count(tokenizer.convert_tokens_to_ids("<|turn|>")) == 1
    assert tokenizer.decode(example.ids[example.num_prompt :], skip_special_tokens=True) == "b<|turn|>"


def test_a_template_without_answers_is_refused(tmp_path):
    made = make_tokenizer("chatml")
    made.chat_template = "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"
    made.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"leaves the answer out; try model\.template=plain"):
        subject.render(row(), subject.load(tmp_path, eos_tokens=["</s>"]))


def test_a_slow_tokenizer_is_refused(tmp_path, monkeypatch):
    make_tokenizer().save_pretrained(tmp_path)
    monkeypatch.setattr(transformers.PreTrainedTokenizerFast, "is_fast", False)
    with pytest.raises(ValueError, match=r"needs a tokenizer\.json"):
        subject.load(tmp_path, eos_tokens=["</s>"])


def test_each_form_of_prompts_has_its_hash(tmp_path):
    hashes = {subject.template_hash(loaded(kind, tmp_path / kind)) for kind in KINDS}
    assert len(hashes) == len(KINDS)
    assert all(re.fullmatch("[0-9a-f]{64}", each) for each in hashes)
