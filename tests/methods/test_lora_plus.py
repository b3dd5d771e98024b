import pytest
import torch
from conftest import tiny_base
from grid import attach

from finetune.methods.lora_plus import LoraPlus
from finetune.methods.method import trainable

LORA = {"task_type": "CAUSAL_LM", "r": 4, "target_modules": ["q_proj", "v_proj"]}


@pytest.mark.parametrize("changes", [{}, {"use_dora": True}], ids=["lora", "dora"])
def test_b_learns_faster_than_the_rest(changes):
    method = LoraPlus(lr_ratio=16.0, **LORA, **changes)
    model = attach(method, tiny_base("qwen2"))
    slow, fast = method.parameter_groups(model, 1e-3)
    names = {id(p): name for name, p in model.named_parameters()}
    assert all("lora_B" in names[id(p)] for p in fast["params"])
    assert not any("lora_B" in names[id(p)] for p in slow["params"])
    assert {id(p) for p in slow["params"] + fast["params"]} == {id(p) for p in trainable(model)}
    assert (slow["lr"], fast["lr"]) == (1e-3, 1.6e-2)


def test_with_ratio_one_it_is_lora():
    method = LoraPlus(lr_ratio=1.0, **LORA)
    groups = method.parameter_groups(attach(method, tiny_base("qwen2")), 1e-3)
    assert {group["lr"] for group in groups} == {1e-3}
    torch.optim.AdamW(groups)


@pytest.mark.parametrize("ratio", [0.0, -1.0])
def test_a_ratio_that_is_not_positive_is_refused(ratio):
    with pytest.raises(ValueError, match="lr_ratio"):
        LoraPlus(lr_ratio=ratio, **LORA)
