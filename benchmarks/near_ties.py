"""Do answers depend on the batch size? In float32 they must not; in bfloat16 a first differing token is a near-tie.

    python -m benchmarks.near_ties model=smollm2 scale=small task=medical_dialogue

For every prompt whose answer differs between batches of one and of 64: the gap in logits, in float32, between the two
tokens where the answers part, beside the median gap between the best two tokens of all answers.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from hydra._internal.utils import get_args_parser

from finetune.cells import cells
from finetune.data import rows
from finetune.environment import pick_device
from finetune.evaluate import Decoding, predict
from finetune.models.load import load
from finetune.models.tokenizer import encode_rows

NUM_ROWS, NEW_TOKENS = 64, 48


def main() -> None:
    """Print one table."""
    [cell] = cells(get_args_parser().parse_args(sys.argv[1:]), root=Path("multirun"))
    config, device = cell.config, pick_device("auto")
    valid = rows.load(config["task"]).valid[:NUM_ROWS]
    print(
        "| precision | rows that differ | largest gap, logits | median gap of the best two, logits |\n|---|--:|--:|--:|"
    )
    exact = _load(config, device, "float32")
    examples = encode_rows(valid, exact.tokenizer, max_prompt_tokens=512, max_target_tokens=64)
    prompts = [list(e.ids[: e.num_prompt]) for e in examples]
    for precision in ("float32", "bfloat16"):
        base = exact if precision == "float32" else _load(config, device, precision)
        alone, together = (_answers(base, prompts, batch_rows) for batch_rows in (1, NUM_ROWS))
        parted = [n for n in range(len(prompts)) if alone[n] != together[n]]
        gaps = [_gap(exact.model, prompts[n], alone[n], together[n]) for n in parted]
        usual = torch.cat([_margins(exact.model, p, a) for p, a in zip(prompts, alone, strict=True)]).median().item()
        print(f"| {precision} | {len(parted)} of {len(prompts)} | {max(gaps, default=0.0):.4f} | {usual:.4f} |")


def _load(config, device, precision):  # type: ignore[no-untyped-def]
    model = {**config["model"], "precision": precision}
    return load(model, scale=config["scale"], quantize=None, device=str(device), max_tokens=1024, log=lambda text: None)


def _answers(base, prompts, batch_rows):  # type: ignore[no-untyped-def]
    decoding = Decoding(NEW_TOKENS, batch_rows, base.end_ids, base.tokenizer.pad_token_id)
    found = {a.number: a.ids for batch in predict(base.model, prompts, decoding) for a in batch}
    return [found[n] for n in range(len(prompts))]


@torch.no_grad()
def _logits(model, prompt, answer):  # type: ignore[no-untyped-def]
    """Float32 logits at every answer position: (tokens, vocabulary)."""
    ids = torch.tensor([prompt + answer], device=model.device)
    return model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 :].float()


def _gap(model, prompt, one, other):  # type: ignore[no-untyped-def]
    at = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    if at >= min(len(one), len(other)):  # one of them ended here
        return _margins(model, prompt, one[:at])[-1].item()
    logits = _logits(model, prompt, one[:at])[-1]
    return (logits[one[at]] - logits[other[at]]).abs().item()


def _margins(model, prompt, answer):  # type: ignore[no-untyped-def]
    best = _logits(model, prompt, answer).topk(2).values
    return best[:, 0] - best[:, 1]


if __name__ == "__main__":
    main()
