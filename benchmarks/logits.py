"""What do logits cost? Peak memory and time of one pack's loss and gradients, by the number of logits at once.

    python -m benchmarks.logits --shape 0.5B --tokens 32768

LoRA of rank 8 on all linear layers in bfloat16, rows of benchmarks.rows in one pack, eager; one JSON line a limit.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from peft import get_peft_model

from benchmarks.contest import details, show
from benchmarks.peers import lora
from benchmarks.rows import rows
from benchmarks.shapes import SHAPES, base, vocab_size
from finetune.data.batches import Batch, pack
from finetune.feeder import summed_loss
from finetune.models.attention import packing
from finetune.models.shape import Shape

LIMITS = {"2^26": 2**26, "2^27": 2**27, "2^28": 2**28, "whole": 2**62}
TIMED = 5


def main() -> None:
    """Measure every limit in turn, on the same model and pack."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="0.5B", choices=list(SHAPES))
    parser.add_argument("--tokens", type=int, default=32768, help="of the pack")
    parser.add_argument("--out", type=Path, default=Path("benchmarks.jsonl"))
    asked = parser.parse_args()
    about = details()
    cuda = torch.cuda.is_available()
    network = base(asked.shape, dtype=torch.bfloat16 if cuda else torch.float32)
    model = get_peft_model(network, lora())
    model.train()
    batch = _pack(asked.tokens, vocab_size=vocab_size(asked.shape)).to(network.device)
    per_token = Shape.of(network.config).bytes_per_token(number_bytes=2, checkpointed=False)
    known = {"what": "logits", "shape": asked.shape, "tokens": batch.num_tokens, "supervised": len(batch.labels)}
    known["estimated_gib_without_logits"] = round(batch.num_tokens * per_token / 2**30, 2)
    for name, most in LIMITS.items():
        with packing(network):
            show({**known, "at_once": name, **_measured(model, batch, most=most), **about}, asked.out)


def _pack(tokens: int, *, vocab_size: int) -> Batch:
    found, size = [], 0
    for row in rows(4096, vocab_size=vocab_size):
        if size + len(row.ids) > tokens:
            break
        found.append(row)
        size += len(row.ids)
    return pack(found)


def _measured(model: torch.nn.Module, batch: Batch, *, most: int) -> dict[str, float]:
    """Loss a token, norm of the gradient, peak memory and milliseconds a pass."""
    cuda = torch.cuda.is_available()

    def run() -> torch.Tensor:
        model.zero_grad()
        with torch.autocast("cuda" if cuda else "cpu", torch.bfloat16, enabled=cuda):
            loss = summed_loss(model, batch, most=most)
        loss.backward()
        return loss.detach()

    run()
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(TIMED):
        loss = run()
    if cuda:
        torch.cuda.synchronize()
    seconds = (time.perf_counter() - began) / TIMED
    slopes = [p.grad.float().norm() for p in model.parameters() if p.grad is not None]
    norm = torch.stack(slopes).norm().item() / len(batch.labels)
    peak = torch.cuda.max_memory_allocated() / 2**30 if cuda else 0.0
    loss_a_token = loss.item() / len(batch.labels)
    return {"loss": loss_a_token, "gradient_norm": norm, "peak_gib": round(peak, 2), "ms": round(1000 * seconds, 1)}


if __name__ == "__main__":
    main()
