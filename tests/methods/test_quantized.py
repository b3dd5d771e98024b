"""Methods on a base whose linear layers are stored in 4 or 8 bits, as far as their own weights are not those."""

import pytest
import torch
from grid import FIELD, NAMES, OTHER_START, attach, config, logits, make, stored_base

from finetune.data.batches import pad
from finetune.feeder import summed_loss
from finetune.methods.method import Method


def able(name):
    found = config(name, "qwen2")["method"]
    return name != "full" and "full_precision" not in found["needs"]


# DoRA on int8 fails on a CPU alone: PEFT 0.21 loses the scales of bitsandbytes' layers there.
CASES = [(name, "nf4") for name in NAMES if able(name)]
CASES += [(name, "int8") for name in NAMES if able(name) and name in FIELD and name != "dora"]


def losses(method: Method, model, examples, *, lr):
    optimizer = torch.optim.AdamW(method.parameter_groups(model, lr))
    for step in range(1, 7):
        loss = summed_loss(model.train(), pad(examples, pad_id=0)) / 100
        (loss + method.penalty(model)).backward()
        optimizer.step()
        method.after_step(model, step)
        optimizer.zero_grad()
        yield loss.item()


@pytest.mark.parametrize(("name", "quantize"), CASES, ids=["-".join(case) for case in CASES])
def test_learns_beside_quantized_weights_and_loads_onto_them_again(name, quantize, tmp_path, examples):
    base = stored_base("qwen2", quantize=quantize, folder=tmp_path / "base")
    ids = pad(examples[:2], pad_id=0).ids
    before = logits(base, ids)
    method = make(name, "qwen2")
    model = attach(method, base)
    if name not in OTHER_START:
        torch.testing.assert_close(logits(model, ids), before, rtol=1e-4, atol=1e-5)
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    found = list(losses(method, model, examples, lr=config(name, "qwen2")["method"]["lr"]["tiny"]))
    assert found[-1] < found[0]
    assert not [n for n, p in model.named_parameters() if n in frozen and not torch.equal(p, frozen[n])]
    method.save(model, tmp_path / "adapter")
    fresh = stored_base("qwen2", quantize=quantize, folder=tmp_path / "base")
    again = make(name, "qwen2").load(fresh, tmp_path / "adapter")
    torch.testing.assert_close(logits(again, ids), logits(model, ids), rtol=1e-3, atol=1e-4)
