"""A stand-in for the package vllm: what the tests give in its place, because the real one wants a GPU.

It takes what `finetune.vllm_engine` hands over, refuses what it does not know, and answers with transformers and PEFT,
one prompt after the other. That vLLM itself does so is not tested anywhere.
"""

import json
import os
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture
def standin(tmp_path_factory):
    """Environment variables with which `import vllm` finds the stand-in, and a function that tells what it was given."""
    folder = tmp_path_factory.mktemp("standin")
    (folder / "vllm" / "lora").mkdir(parents=True)
    (folder / "vllm" / "__init__.py").write_text(PACKAGE)
    (folder / "vllm" / "lora" / "__init__.py").write_text("")
    (folder / "vllm" / "lora" / "request.py").write_text(REQUEST)
    log = folder / "log.jsonl"

    def given(kind):
        lines = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
        return [line[kind] for line in lines if kind in line]

    path = os.pathsep.join([str(folder), str(ROOT)])
    return {"PYTHONPATH": path, "STANDIN_LOG": str(log)}, given


REQUEST = """
class LoRARequest:
    def __init__(self, lora_name, lora_int_id, lora_path=""):
        assert lora_int_id > 0
        self.lora_path = lora_path
"""

PACKAGE = """
import json, os, time
from dataclasses import dataclass, field
from types import SimpleNamespace

import torch, transformers
from peft import PeftModel

__version__ = "stand-in"

def _tell(**what):
    with open(os.environ["STANDIN_LOG"], "a") as file:
        file.write(json.dumps(what) + "\\n")

@dataclass
class SamplingParams:
    temperature: float
    max_tokens: int
    stop_token_ids: list
    ignore_eos: bool
    detokenize: bool

class LLM:
    def __init__(self, *, model, trust_remote_code, dtype, max_model_len, max_num_seqs, skip_tokenizer_init,
                 generation_config, seed, gpu_memory_utilization=None, enable_lora=False, max_lora_rank=16):
        print("words of the stand-in")  # as libraries do
        _tell(start={"model": model, "dtype": dtype, "max_model_len": max_model_len, "max_num_seqs": max_num_seqs,
                     "max_lora_rank": max_lora_rank if enable_lora else None, "pid": os.getpid()})
        if max_num_seqs > int(os.environ.get("STANDIN_ROOM", 1000)):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate too much")
        self.room, self.length, self.batches = max_num_seqs, max_model_len, 0
        self.tuned = None
        self.model = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=dtype).eval()

    @torch.no_grad()
    def generate(self, prompts, sampling_params, *, use_tqdm, lora_request):
        prompts = [prompt["prompt_token_ids"] for prompt in prompts]
        _tell(prompts=prompts, adapter=lora_request and lora_request.lora_path)
        if self.batches == int(os.environ.get("STANDIN_BREAKS", -1)):
            raise RuntimeError("a kernel failed")
        if self.batches == int(os.environ.get("STANDIN_HANGS", -1)):
            time.sleep(1000)
        self.batches += 1
        if lora_request and not self.tuned:
            self.tuned = PeftModel.from_pretrained(self.model, lora_request.lora_path).eval()
        assert sampling_params.temperature == 0 and sampling_params.ignore_eos and not sampling_params.detokenize
        return [SimpleNamespace(outputs=[self._one(ids, sampling_params)]) for ids in prompts]

    def _one(self, ids, sampling):
        model, ids, new = self.tuned or self.model, list(ids), []
        while True:
            new.append(int(model(input_ids=torch.tensor([ids + new])).logits[0, -1].argmax()))
            if new[-1] in sampling.stop_token_ids:  # which stays in token_ids
                return SimpleNamespace(token_ids=tuple(new), finish_reason="stop")
            if len(new) == sampling.max_tokens or len(ids) + len(new) == self.length:
                return SimpleNamespace(token_ids=tuple(new), finish_reason="length")
"""
