"""How fast are answers generated? Prompts of 200 tokens, 64 new ones, random weights of Qwen2.5-0.5B's shape, bfloat16.

    python -m benchmarks.decoding --rows 8,64,256,512

`generate` is transformers' own, greedy; with LoRA beside the weights, and merged into them. `places` is this project's,
for both, without attention by cuDNN, as in a job. All in one process, the second of two runs each; rows whose tokens
are those of `generate` are counted.
"""

from __future__ import annotations

import argparse
import contextlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor

from benchmarks.contest import details, show
from benchmarks.peers import lora
from benchmarks.shapes import base, vocab_size
from finetune.environment import without_plans
from finetune.greedy import greedy
from finetune.models.lean import lean

PROMPT, NEW = 200, 64


def main() -> None:
    """Measure every decoder in turn; one JSON line each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="8,64,256,512")
    parser.add_argument("--shape", default="0.5B")
    parser.add_argument("--out", type=Path, default=Path("benchmarks.jsonl"))
    args = parser.parse_args()
    about = details()
    model = get_peft_model(base(args.shape, dtype=torch.bfloat16), lora()).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.01)
    merged: Any = None
    for weights in ("beside", "merged"):
        if weights == "merged":
            merged = model.merge_and_unload()
        network = merged or model
        for count in map(int, args.rows.split(",")):
            ids = torch.randint(5, vocab_size(args.shape), (count, PROMPT), device=network.device)
            reference: Tensor | None = None
            for name, decode in (("generate", _generate), ("places", _places)):
                new, rate = _timed(decode, network, ids)
                reference = new if reference is None else reference
                equal = int((new == reference).all(dim=1).sum())
                line = {"what": "decoding", "shape": args.shape, "weights": weights, "rows": count, "decoder": name}
                show({**line, "tokens_per_second": rate, "equal": equal, **about}, args.out)


def _timed(decode: Callable[[Any, Tensor], Tensor], network: Any, ids: Tensor) -> tuple[Tensor, float]:
    for _ in range(2):
        began = _now()
        new = decode(network, ids)
        seconds = _now() - began
    return new, new.numel() / seconds


@torch.no_grad()
def _generate(network: Any, ids: Tensor) -> Tensor:
    mask = torch.ones_like(ids)
    how = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "pad_token_id": 0, "use_cache": True}
    found: Tensor = network.generate(input_ids=ids, attention_mask=mask, **how)
    return found[:, PROMPT:]


@torch.no_grad()
def _places(network: Any, ids: Tensor) -> Tensor:
    before = torch.backends.cuda.cudnn_sdp_enabled()
    without_plans()
    within = lean(network) if isinstance(network, PeftModel) else contextlib.nullcontext()
    try:
        with within, torch.autocast(ids.device.type, torch.bfloat16):
            return greedy(network, ids, torch.ones_like(ids), NEW, end_ids=[-1], pad_id=0, replayed=ids.is_cuda)
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


if __name__ == "__main__":
    main()
