import concurrent.futures
import dataclasses
import hashlib
import itertools
import random
import string

import pytest
import torch
import transformers

from finetune.data import clinic, corpus
from finetune.models import miniature

CLASSES = {
    "qwen": transformers.Qwen2ForCausalLM,
    "llama": transformers.LlamaForCausalLM,
    "chatglm": transformers.GlmForCausalLM,
    "bloom": transformers.BloomForCausalLM,
}
TINY = miniature.Recipe("qwen", tokenizer_documents=300, num_steps=2, rows=2, length=32)


def quiet(_):
    pass


def tiny(architecture, **changes):
    return dataclasses.replace(TINY, architecture=architecture, **changes)


def weights_hash(folder):
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


def make_here(cache):
    return miniature.make(TINY, name="qwen", cache=cache, log=quiet)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def tokenizer():
    return miniature._tokenizer(miniature.RECIPES["qwen"])


@pytest.mark.parametrize("architecture", CLASSES)
def test_a_base_is_of_its_class_and_small(architecture, cache):
    folder = miniature.make(tiny(architecture), name=architecture, cache=cache, log=quiet)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert type(model) is CLASSES[architecture]
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert sum(path.stat().st_size for path in folder.iterdir()) < 20e6


def test_the_tokenizer_keeps_text_and_has_its_two_special_tokens(cache):
    folder = make_here(cache)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    text = "用户：发热3天，\nHello 罕见字龘？\n助手："
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<eos>", "<pad>")
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert model.generation_config.pad_token_id == tokenizer.pad_token_id
    assert tokenizer.eos_token_id not in tokenizer(text).input_ids


def test_words_of_the_demo_task_are_single_tokens(tokenizer):
    assert not [word for word in corpus.WORDS if len(tokenizer(word).input_ids) > 1]


def test_no_token_of_the_demo_task_is_new_to_the_base(tokenizer):
    text = list(itertools.islice(corpus.documents(), 6000))
    seen = set(itertools.chain(*tokenizer(text).input_ids))
    demo = [row["input"] + row["target"] for row in clinic.read()]
    assert not set(itertools.chain(*tokenizer(demo).input_ids)) - seen


def test_the_same_recipe_gives_the_same_weights(cache, tmp_path):
    assert weights_hash(make_here(cache)) == weights_hash(make_here(tmp_path))


def test_every_constant_of_the_recipe_names_another_folder():
    changed = {
        field.name: dataclasses.replace(TINY, **{field.name: getattr(TINY, field.name) + 1})
        for field in dataclasses.fields(TINY)
        if field.name not in ("architecture", "extends")
    }
    changed["architecture"] = dataclasses.replace(TINY, architecture="llama")
    changed["extends"] = dataclasses.replace(TINY, extends=TINY)
    assert len({recipe.key() for recipe in [TINY, *changed.values()]}) == len(changed) + 1


def test_the_random_state_of_the_caller_is_left_alone(tmp_path):
    torch.manual_seed(5)
    wanted = torch.rand(1)
    torch.manual_seed(5)
    make_here(tmp_path)
    assert torch.rand(1) == wanted


def test_of_two_that_want_one_base_one_makes_it(tmp_path):
    said = []  # a file lock keeps threads apart as it does processes
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        makes = [pool.submit(miniature.make, TINY, name="qwen", cache=tmp_path, log=said.append) for _ in range(2)]
    assert makes[0].result() == makes[1].result()
    assert [line.split()[0] for line in said] == ["making", "made"]


def test_what_a_killed_process_left_is_made_anew(tmp_path):
    folder = tmp_path / "miniatures" / f"qwen-{TINY.key()}"
    draft = folder.with_name(f"{folder.name}.draft")
    draft.mkdir(parents=True)
    (draft / "model.safetensors").write_bytes(b"half")
    assert make_here(tmp_path) == folder
    assert not draft.exists()
    assert transformers.AutoModelForCausalLM.from_pretrained(folder)


def test_what_is_there_is_not_made_again(cache):
    folder = make_here(cache)
    said = []
    assert miniature.make(TINY, name="qwen", cache=cache, log=said.append) == folder
    assert said == []


def test_a_longer_vocabulary_keeps_the_old_tokens_and_starts_from_their_pieces(cache):
    short = tiny("llama", vocabulary=700)
    long = tiny("llama", extends=short, vocabulary=900, matrix_lr=0.0, other_lr=0.0)
    old, new = (
        miniature.make(recipe, name=name, cache=cache, log=quiet)
        for recipe, name in ((short, "llama"), (long, "longer"))
    )
    old_tokenizer, new_tokenizer = map(transformers.AutoTokenizer.from_pretrained, (old, new))
    assert old_tokenizer.get_vocab().items() < new_tokenizer.get_vocab().items()
    rows = [transformers.AutoModelForCausalLM.from_pretrained(f).get_input_embeddings().weight for f in (old, new)]
    assert rows[1].shape[0] == len(new_tokenizer)
    torch.testing.assert_close(rows[1][: len(rows[0])], rows[0])
    pieces = old_tokenizer(new_tokenizer.decode([len(rows[0])])).input_ids
    torch.testing.assert_close(rows[1][len(rows[0])], rows[0][pieces].mean(0))


@pytest.mark.parametrize("architecture", CLASSES)
def test_an_untrained_base_copies_what_it_has_seen(architecture):
    recipe = dataclasses.replace(miniature.RECIPES[architecture], tokenizer_documents=300)
    tokenizer = miniature._tokenizer(recipe)
    torch.manual_seed(0)
    model = miniature._fresh(recipe, tokenizer=tokenizer)
    rng = random.Random(0)
    letters = [tokenizer(letter).input_ids[0] for letter in string.printable[:90]]
    ids = torch.tensor([rng.sample(letters, 16) * 2 for _ in range(20)])  # (rows, tokens)
    guesses = model(input_ids=ids).logits[:, 16:-1].argmax(-1)
    assert (guesses == ids[:, 17:]).float().mean() > 0.3  # by chance 0.06


def test_an_unknown_architecture_is_refused_with_the_known_ones(tmp_path):
    with pytest.raises(ValueError, match="no miniature of 'gpt'; there are qwen, llama, chatglm, bloom, chinese_llama"):
        miniature.build("gpt", cache=tmp_path)


def test_a_cache_that_cannot_be_made_is_told_by_name(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / "file"))
    with pytest.raises(ValueError, match=r"no miniature .*file/miniatures \(Not a directory\): set FINETUNE_CACHE"):
        miniature.build("qwen")
