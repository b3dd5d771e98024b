"""What several methods' tests ask alike."""

import pytest
import torch

from finetune.data.batches import pack, pad
from finetune.feeder import summed_loss
from finetune.methods.method import trainable
from finetune.models.attention import packing


def gradients(model):
    """A copy of them; the model's are zero then."""
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def assert_same(found, expected):
    """Of gradients by name."""
    assert found
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5, msg=name)


def assert_a_pack_is_its_rows(model, examples, *, checkpointing):
    """The loss and gradients of one pack are those of single rows."""
    single = sum(summed_loss(model, pad([e], pad_id=0)) for e in examples)
    single.backward()
    expected = gradients(model)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    with packing(model):
        packed = summed_loss(model, pack(examples))
        packed.backward()
    assert packed.item() == pytest.approx(single.item(), rel=1e-5)
    assert_same(gradients(model), expected)


def assert_learns(model, examples, *, lr):
    """Eight steps lower the loss."""
    optimizer = torch.optim.AdamW(trainable(model), lr=lr)
    losses = []
    for _ in range(8):
        loss = summed_loss(model.train(), pad(examples, pad_id=0)) / 100
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
