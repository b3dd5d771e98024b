import pytest
import torch
from conftest import ARCHITECTURES, tiny_base
from test_loop import losses, train

from finetune.data.batches import pack, pad
from finetune.noise import noisy


def lookups(model, batch, *, alpha, seed=0):
    """The batch's embeddings (rows, length, hidden) without and with noise."""
    layer = model.get_input_embeddings()
    plain = layer(batch.ids)
    torch.manual_seed(seed)
    with noisy(model, batch, alpha=alpha):
        changed = layer(batch.ids)
    assert torch.equal(layer(batch.ids), plain)
    return plain, changed


@pytest.mark.parametrize("lay", [pack, lambda rows: pad(rows, pad_id=0)], ids=["packed", "padded"])
def test_noise_is_bounded_by_each_rows_own_length(lay, examples):
    plain, changed = lookups(tiny_base("qwen2"), lay(examples), alpha=5.0)
    noise = (changed - plain).flatten(0, 1)
    rows = noise.split([len(e.ids) for e in examples]) if lay is pack else (changed - plain)
    for row, example in zip(rows, examples, strict=True):
        length, width = len(example.ids), row.shape[1]
        size = row[:length].abs().max() * (length * width) ** 0.5
        assert 4.8 < size < 5.0001  # so many draws come near the bound
        assert not row[length:].any()


def test_noise_is_fresh_and_follows_the_seed(examples):
    model, batch = tiny_base("qwen2"), pack(examples)
    once, again, other = (lookups(model, batch, alpha=5.0, seed=seed)[1] for seed in (0, 0, 1))
    assert torch.equal(once, again)
    assert not torch.equal(once, other)
    with noisy(model, batch, alpha=5.0):
        layer = model.get_input_embeddings()
        assert not torch.equal(layer(batch.ids), layer(batch.ids))
        short = batch.ids[:, :3]  # not the batch's rows, such as virtual tokens
        assert torch.equal(layer(short), layer.weight[short])


def test_off_is_bit_equal(examples):
    assert losses(train(examples, neftune_alpha=None)) == losses(train(examples))


PROMPT = {"_target_": "peft.PromptTuningConfig", "task_type": "CAUSAL_LM", "num_virtual_tokens": 4}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("adapter", [{}, {"adapter": PROMPT}], ids=["lora", "prompt"])
def test_training_feels_it_and_evaluation_does_not(architecture, adapter, examples):
    options = {"architecture": architecture, "packed": False, **adapter}
    still = train(examples, neftune_alpha=5.0, lr=0.0, validations=9, batch_rows=12, **options)
    assert len({line["valid_loss"] for line in still}) == 1
    assert len(set(losses(still))) == len(still)
