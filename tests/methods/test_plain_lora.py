"""What `evaluate.backend=vllm` lets through is saved as vLLM reads it: x W + s x A B, and nothing else."""

import json
import math

import pytest
import torch
from grid import NAMES, UNTRAINED, attach, config, logits, make, varied_base
from hydra._internal.utils import get_args_parser
from safetensors.torch import load_file

from finetune.cells import cells
from finetune.config import problems

METHODS = ("delta_lora", "lora", "lora_orthogonal", "lora_plus", "lora_qkv", "mica", "rslora")
IDS = torch.arange(3, 33).reshape(2, 15)


def trained(name, architecture):
    """The method's model, its weights moved from their start."""
    method = make(name, architecture)
    model = attach(method, varied_base(architecture))
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return method, model


def test_they_and_untrained_bases_are_all_that_it_lets_through(tmp_path):
    words = ["evaluate.backend=vllm", "model.precision=bfloat16"]
    [cell] = cells(get_args_parser().parse_args(words), root=tmp_path)

    def refused(name):
        method = {**config(name, "qwen2")["method"], "quantize": None}  # whose refusal would hide another
        return problems({**cell.config, "method": method})

    found = {name: refused(name) for name in (*NAMES, *UNTRAINED) if name != "qlora"}
    assert {name for name, said in found.items() if not said} == {*METHODS, "none", "few_shot"}
    for name, said in found.items():
        assert not said or (len(said) == 1 and f"method={name}" in said[0]), said


@pytest.mark.parametrize("architecture", ["qwen2", "glm"])
@pytest.mark.parametrize("name", METHODS)
@torch.no_grad()
def test_the_files_alone_give_the_tuned_model(name, architecture, tmp_path):
    method, model = trained(name, architecture)
    method.save(model, tmp_path)
    config, files = (json.loads((tmp_path / "adapter_config.json").read_text()), {})
    for key, tensor in load_file(tmp_path / "adapter_model.safetensors").items():
        layer, kind = key.removeprefix("base_model.model.").rsplit(".lora_", 1)
        files.setdefault(layer, {})[kind] = tensor
    base = varied_base(architecture)
    scale = config["lora_alpha"] / (math.sqrt(config["r"]) if config["use_rslora"] else config["r"])
    for layer, factors in files.items():
        assert set(factors) == {"A.weight", "B.weight"}
        assert len(factors["A.weight"]) == config["r"]
        base.get_submodule(layer).weight += scale * factors["B.weight"] @ factors["A.weight"]
    expected = logits(model, IDS)
    torch.testing.assert_close(logits(base, IDS), expected, atol=1e-4, rtol=1e-4)
    assert (expected - logits(varied_base(architecture), IDS)).abs().max() > 0.1
