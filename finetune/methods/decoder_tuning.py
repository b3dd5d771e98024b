"""Decoder tuning: the base is only asked; a small head on what it says learns to choose among given answers."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

from finetune.data.rows import Row
from finetune.methods.method import Encode, Finding, Method

FILE = "head.safetensors"
REASON = "needs a list of choices"


class Head(nn.Module):
    """A sphere for each label: similarity = radius - distance of the projected hidden state to its centre."""

    def __init__(self, labels: Sequence[str], *, width: int, size: int) -> None:
        super().__init__()
        self.labels = list(labels)
        self.project = nn.Linear(width, size, bias=False)
        self.centres = nn.Parameter(torch.zeros(len(labels), size))
        self.radii = nn.Parameter(torch.zeros(len(labels)))

    def forward(self, hidden: Tensor) -> Tensor:
        """Similarity (rows, labels) of hidden states (rows, width)."""
        points = normalize(self.project(hidden), dim=-1)
        return self.radii - torch.cdist(points, self.centres)

    @torch.no_grad()
    def start(self, hidden: Tensor, chosen: Tensor) -> None:
        """Centres at the mean of their rows, radii their mean distance from it."""
        points = normalize(self.project(hidden), dim=-1)
        for label in range(len(self.labels)):
            own = points[chosen == label]
            self.centres[label] = own.mean(dim=0)
            self.radii[label] = (own - self.centres[label]).norm(dim=-1).mean()


@dataclass(frozen=True)
class Seen:
    """What the base said to a row."""

    hidden: Tensor  # (width,) the last hidden state where the answer begins, float32 on the CPU
    candidates: list[str]
    scores: Tensor  # (candidates,) calibrated log-probabilities


class DecoderTuning(Method):
    """Cui et al. 2023, arXiv:2212.08408: prototypes of the labels, plus the base's own calibrated scores.

    A choice's score is the log-probability of the whole of it, as choices share first tokens, less what it is after an
    empty question (eq. 2). Learns width x size + labels x (size + 1) parameters a task. A row may also be answered by
    what training rows of its task answer outside of their own choices.
    """

    trains = False
    answers = True

    def __init__(self, *, size: int, epochs: int, weight: float | None) -> None:
        if size < 1 or epochs < 1:
            raise ValueError(f"size={size} and epochs={epochs} must be at least 1")
        self.size, self.epochs, self.weight = size, epochs, weight
        self.heads: dict[str, Head] = {}  # by task
        self.shares: dict[str, float] = {}  # of the base's scores, by task
        self.others: dict[str, list[str]] = {}  # answers outside of the row's own choices, by task
        self.blank: dict[str, tuple[list[int], float]] = {}  # choice -> its ids, its log-probability without a question
        self.losses: tuple[float, float] = (0.0, 0.0)  # the last head's, before and after

    def unanswerable(self, train_rows: Sequence[Row]) -> dict[str, str]:
        """Tasks in which most answers are no choice of their row."""
        return {task: REASON for task, rows in _by_task(train_rows) if not _chooses(rows)}

    def attach(self, model: Any, *, tokenizer: Any, num_steps: int, train_rows: Sequence[Row]) -> Any:
        """Freeze everything."""
        return model.requires_grad_(False)

    def fit(self, model: Any, rows: Sequence[Row], *, encode: Encode, lr: float) -> int:
        """Ask the base about every training row once, then train a head for each task."""
        for task, own in _by_task(rows):
            if _chooses(own):
                self.others[task] = sorted({row.target for row in own if row.target not in row.choices})
                self.heads[task] = self._head(task, own, self._ask(model, own, encode=encode), lr=lr)
        return sum(p.numel() for head in self.heads.values() for p in head.parameters())

    def predict(self, model: Any, rows: Sequence[Row], *, encode: Encode) -> list[str] | None:
        """The likeliest candidate of each row; a task without a head is answered by the base's scores."""
        return [
            self._choose(row.task, seen) for row, seen in zip(rows, self._ask(model, rows, encode=encode), strict=True)
        ]

    def check(self, model: Any) -> Finding | None:
        """Did the head learn?"""
        first, last = self.losses
        return Finding(
            last < first, f"{len(self.heads)} heads; the last one's loss went from {first:.3f} to {last:.3f}"
        )

    def save(self, model: Any, folder: Path) -> None:
        """The heads and their labels."""
        folder.mkdir(parents=True, exist_ok=True)
        tasks = [[task, head.labels, self.others[task], self.shares[task]] for task, head in self.heads.items()]
        tensors = {f"{n}.{k}": v for n, h in enumerate(self.heads.values()) for k, v in h.state_dict().items()}
        save_file(tensors, folder / FILE, metadata={"tasks": json.dumps(tasks)})

    def load(self, model: Any, folder: Path) -> Any:
        """The saved heads; the base as it is."""
        with safe_open(folder / FILE, framework="pt") as file:
            for n, (task, labels, others, share) in enumerate(json.loads(file.metadata()["tasks"])):
                state = {k.partition(".")[2]: file.get_tensor(k) for k in file.keys() if k.startswith(f"{n}.")}  # noqa: SIM118
                self.heads[task] = Head(labels, width=state["project.weight"].shape[1], size=self.size)
                self.heads[task].load_state_dict(state)
                self.others[task], self.shares[task] = others, share
        return model.requires_grad_(False)

    def _head(self, task: str, rows: Sequence[Row], seen: Sequence[Seen], *, lr: float) -> Head:
        """Full-batch Adam on the cross-entropy over each row's candidates."""
        labels = sorted({row.target for row in rows})
        self.shares[task] = len(labels) / len(rows) if self.weight is None else self.weight
        hidden = torch.stack([one.hidden for one in seen])
        chosen = torch.tensor([labels.index(row.target) for row in rows])
        scores = torch.stack([_spread(one, labels) for one in seen])  # (rows, labels), -inf for what is no candidate
        head = Head(labels, width=hidden.shape[1], size=self.size)
        head.start(hidden, chosen)
        optimizer = torch.optim.Adam(head.parameters(), lr=lr)
        losses = []
        for _ in range(self.epochs):
            loss = cross_entropy(head(hidden) + self.shares[task] * scores, chosen)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        self.losses = (losses[0], losses[-1])
        return head

    @torch.no_grad()
    def _choose(self, task: str, seen: Seen) -> str:
        """A candidate that training never chose is as unlike as the row's least similar one."""
        if not seen.candidates:
            return ""
        if task not in self.heads:
            return seen.candidates[int(seen.scores.argmax())]
        similar = dict(zip(self.heads[task].labels, self.heads[task](seen.hidden[None])[0].tolist(), strict=True))
        least = min((similar[c] for c in seen.candidates if c in similar), default=0.0)
        both = [
            similar.get(c, least) + self.shares[task] * float(s)
            for c, s in zip(seen.candidates, seen.scores, strict=True)
        ]
        return seen.candidates[both.index(max(both))]

    def _ask(self, model: Any, rows: Sequence[Row], *, encode: Encode) -> list[Seen]:
        """One pass over each prompt, and one over its candidates behind it."""
        model.eval()
        return [self._seen(model, row, example.ids[: example.num_prompt], encode=encode)
                for row, example in zip(rows, encode(rows), strict=True)]  # fmt: skip

    def _seen(self, model: Any, row: Row, prompt: Sequence[int], *, encode: Encode) -> Seen:
        candidates = list(dict.fromkeys((*row.choices, *self.others.get(row.task, ()))))
        for choice in candidates:
            if choice not in self.blank:
                [example] = encode([replace(row, prompt="", history=(), target=choice)])
                ids = list(example.ids[example.num_prompt :])
                self.blank[choice] = ids, float(_query(model, example.ids[: example.num_prompt], [ids])[1])
        known = [self.blank[choice] for choice in candidates]
        hidden, scores = _query(model, prompt, [ids for ids, _ in known])
        return Seen(hidden, candidates, (scores - torch.tensor([blank for _, blank in known])).log_softmax(dim=0))


@torch.no_grad()
def _query(model: Any, prompt: Sequence[int], choices: Sequence[list[int]]) -> tuple[Tensor, Tensor]:
    """The last hidden state (width,) of a prompt and the log-probability of each choice after it, its end included."""
    ids = torch.tensor([prompt], device=model.device)
    asked = model(input_ids=ids, use_cache=True, output_hidden_states=True, logits_to_keep=1)
    hidden = asked.hidden_states[-1][0, -1].float().cpu()
    if not choices:
        return hidden, torch.zeros(0)
    longest, count = max(map(len, choices)), len(choices)
    padded = torch.tensor([[*choice, *[0] * (longest - len(choice))] for choice in choices], device=model.device)
    cache = asked.past_key_values
    cache.batch_repeat_interleave(count)
    mask = torch.ones(count, len(prompt) + longest, dtype=torch.long, device=model.device)
    then = model(input_ids=padded, past_key_values=cache, attention_mask=mask, use_cache=True).logits
    logits = torch.cat(
        [asked.logits[:, -1:].expand(count, -1, -1), then[:, :-1]], dim=1
    )  # (choices, longest, vocabulary)
    each = logits.float().log_softmax(dim=-1).gather(2, padded[:, :, None])[:, :, 0].cpu()
    real = torch.tensor([[n < len(choice) for n in range(longest)] for choice in choices])
    return hidden, (each * real).sum(dim=1)


def _spread(seen: Seen, labels: Sequence[str]) -> Tensor:
    """The candidates' scores (labels,) in the labels' order, -inf for labels that are no candidates."""
    found = dict(zip(seen.candidates, seen.scores.tolist(), strict=True))
    return torch.tensor([found.get(label, float("-inf")) for label in labels])


def _by_task(rows: Sequence[Row]) -> Iterator[tuple[str, list[Row]]]:
    found: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        found[row.task].append(row)
    yield from found.items()


def _chooses(rows: Sequence[Row]) -> bool:
    """Is the answer one of the row's choices, mostly?"""
    return 2 * sum(row.target in row.choices for row in rows) > len(rows)
