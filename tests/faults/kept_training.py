"""`python kept_training.py FOLDER KEPT`: eight steps with the keeper of a run, a checkpoint after each, KEPT of them kept.

Small enough to be killed hundreds of times. It says after which step it goes on, and ends with result.json.
"""

import hashlib
import logging
import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from finetune import checkpoint, runs
from finetune.methods.method import Method
from finetune.resume import Keeper, Moving, changing
from finetune.stop import STATUS, Stop, Stopped

NUM_STEPS = 8


class Plain(Method):
    """The model as it is."""

    def attach(self, model, **_):
        return model


def train(run, stop):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(8, 16), nn.Dropout(0.3), nn.BatchNorm1d(16), nn.Linear(16, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    schedule = LambdaLR(optimizer, lambda step: 1 - step / NUM_STEPS)
    keeper = Keeper(run, accelerator=Accelerator(cpu=True), num_steps=NUM_STEPS, minutes=0, stop=stop)
    moving = Moving(model, Plain(), optimizer, schedule, None)
    with stop.held():
        for step in range(1 + len(keeper.resume(moving)), NUM_STEPS + 1):
            loss = (model(torch.randn(4, 8)) - 1).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            line = {"step": step, "loss": float(loss), "seconds": float(step)}
            runs.append_lines(run / "steps.jsonl", [line])
            keeper.history.append(line)
            keeper.after(step, moving)
    digest = hashlib.sha256(b"".join(t.detach().numpy().tobytes() for t in changing(model).values()))
    runs.write_json(run / "result.json", {"losses": keeper.history, "weights": digest.hexdigest()})


def main():
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    run, checkpoint.KEPT = Path(sys.argv[1]), int(sys.argv[2])
    run.mkdir(parents=True, exist_ok=True)
    stop = Stop()
    stop.listen()
    try:
        train(run, stop)
    except Stopped:
        sys.exit(STATUS)


if __name__ == "__main__":
    main()
