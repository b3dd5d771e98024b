"""How much an optimizer step holds: the plan of a run, in rows or within a budget of tokens that is given or found.

The budget that is found (`optim.batch_tokens=auto`) is the largest power of two that memory, by the estimate below, and
statistics allow. The first step confirms it: where memory runs out after all the loop halves its batches, not the step.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import psutil
import torch
from accelerate.utils import broadcast_object_list

from finetune import runs
from finetune.data.batches import WASTE, plan, plan_by_tokens
from finetune.feeder import PACK_TOKENS
from finetune.job import Job
from finetune.models.head import MOST_LOGITS
from finetune.models.shape import Shape

log = logging.getLogger("finetune")

# What statistics want, where `auto` decides. 16384 tokens are some 64 rows of the three PromptCBLUE tasks: a GPU is
# busy with them (docs/benchmarks.md), the methods' learning rates are for about 8 rows, and more rows a step than the
# noise of their gradients asks for are lost (McCandlish et al. 2018, arXiv:1812.06162).
MOST_TOKENS = 16384
FEWEST_STEPS = 100  # of a run: fewer leave no room for a warm-up and a schedule
# Of the free memory that may be planned for; the rest is fragments, graphs and what was not thought of.
FREE_SHARE = 0.8
TRAINED_SHARE = 0.05  # parameters that a method adds to a base that stays as it is, at the most
LOGIT_BYTES = 10  # see finetune.models.head


def planned(job: Job) -> tuple[list[list[int]], int | None]:
    """Row numbers of every optimizer step, and the budget that they keep; None if steps are counted in rows."""
    optim = job.config["optim"]
    if not job.method.trains:
        return [], None
    given = {"epochs": optim["epochs"], "max_steps": optim["max_steps"], "seed": job.config["seed"]}
    if optim["batch_tokens"] is None:
        return plan(len(job.train_rows), batch_rows=optim["batch_rows"], **given), None
    lengths = [len(example.ids) for example in job.train_rows]
    budget = _found(job, lengths, given) if optim["batch_tokens"] == "auto" else int(optim["batch_tokens"])
    refuse_long_rows(lengths, batch_tokens=budget, ids=[row.id for row in job.split.train])
    steps = plan_by_tokens(lengths, batch_tokens=budget, **given)
    refuse_short_steps(steps, batch_tokens=budget, ranks=job.accelerator.num_processes)
    return steps, budget


def recomputes(job: Job, steps: Sequence[Sequence[int]], *, num_trained: int) -> bool:
    """Are activations recomputed in the backward pass? `auto`: where those of the largest pass would not fit.

    `num_trained` parameters are trained, and are there already.
    """
    asked = job.config["model"]["checkpoint_activations"]
    if not (asked and steps):
        return False
    if not job.method.checkpointable:
        if asked is True:
            log.warning("%s cannot checkpoint activations: trained without", job.config["method"]["name"])
        return False
    return True if asked is True else bool(_of_all(job, lambda: _too_large(job, steps, num_trained)))


def largest_pass(lengths: Sequence[int], steps: Sequence[Sequence[int]], *, parts: int, most: int | None) -> int:
    """Tokens of the largest of the `parts` of each step, in packs of at most `most` tokens; None: padded."""
    found = [[lengths[row] for row in rows[part::parts]] for rows in steps for part in range(parts)]
    if most is None:
        return max(len(part) * max(part, default=0) for part in found)
    return max(min(max(map(sum, found)), most), max(lengths))


def refuse_long_rows(lengths: Sequence[int], *, batch_tokens: int, ids: Sequence[str]) -> None:
    """Raise ValueError if a row alone exceeds the budget: rows are never split."""
    longest = max(range(len(lengths)), key=lengths.__getitem__)
    number = sum(length > batch_tokens for length in lengths)
    if number:
        raise ValueError(
            f"optim.batch_tokens={batch_tokens}: {number} training rows are longer, the longest ({ids[longest]}) has "
            f"{lengths[longest]} tokens; set optim.batch_tokens={lengths[longest]} or more, or smaller "
            "task.max_prompt_tokens and task.max_target_tokens"
        )


def refuse_short_steps(steps: Sequence[Sequence[int]], *, batch_tokens: int, ranks: int) -> None:
    """Raise ValueError if a step has fewer rows than there are processes: each needs a gradient."""
    fewest = min(range(len(steps)), key=lambda number: len(steps[number]))
    if len(steps[fewest]) < ranks:
        raise ValueError(
            f"optim.batch_tokens={batch_tokens}: step {fewest + 1} has {len(steps[fewest])} rows, fewer than the "
            f"launch.num_processes={ranks} that share it; try optim.batch_tokens={batch_tokens * ranks}"
        )


def allowed(lengths: Sequence[int], *, epochs: float, fitting: int | None) -> int:
    """The largest power of two that memory (`fitting` tokens; None: any number) and statistics allow.

    It holds the longest row in any case; whether that fits is seen when it is trained.
    """
    memory = MOST_TOKENS if fitting is None else fitting
    most = min(MOST_TOKENS, int(epochs * sum(lengths)) // FEWEST_STEPS, memory)
    return max(_power_below(max(most, 1)), _power_above(max(lengths)))


def fitting_tokens(shape: Shape, *, num_parameters: int, free: int, trains_base: bool, **numbers: Any) -> int:
    """Tokens of a pass that fit into `free` bytes beside what is loaded; `numbers` are those of `bytes_per_token`.

    What is trained needs, in float32, a gradient and two moments a weight; weights that are added also themselves.
    """
    states = 12 * num_parameters if trains_base else int(16 * TRAINED_SHARE * num_parameters)
    logits = LOGIT_BYTES * min(MOST_LOGITS, shape.vocabulary * MOST_TOKENS)
    left = FREE_SHARE * free - states - logits
    return max(0, int(left / shape.bytes_per_token(**numbers)))


def _found(job: Job, lengths: Sequence[int], given: Mapping[str, Any]) -> int:
    """The budget of `auto`, the same in all processes, and the same when the run is gone on with."""
    return int(_of_all(job, lambda: _decided(job, lengths, given)))


def _of_all(job: Job, decide: Callable[[], int]) -> int:
    """What the first process decides."""
    found = [decide() if job.main else 0]
    if job.accelerator.num_processes > 1:
        broadcast_object_list(found)
    return found[0]


def _too_large(job: Job, steps: Sequence[Sequence[int]], num_trained: int) -> bool:
    """Does the largest pass not fit without recomputing? As environment.json says, or else will say from now on."""
    record = runs.read_environment(job.run)
    if isinstance(known := record.get("checkpoint_activations"), bool):
        return known
    parts = job.accelerator.num_processes * int(job.config["optim"]["accumulation"])
    most = job.feeder.most_tokens if job.feeder.packed else None
    tokens = largest_pass([len(example.ids) for example in job.train_rows], steps, parts=parts, most=most)
    fitting = _fitting_pass(job, checkpointed=False, num_parameters=num_trained, trains_base=True)
    if tokens > fitting:
        log.info(
            "activations are recomputed: a pass has up to %d tokens, and without %d fit into memory", tokens, fitting
        )
    runs.write_json(job.run / "environment.json", {**record, "checkpoint_activations": tokens > fitting})
    return tokens > fitting


def _decided(job: Job, lengths: Sequence[int], given: Mapping[str, Any]) -> int:
    """What environment.json says, or else will say from now on."""
    record = runs.read_environment(job.run)
    known = record.get("batch_tokens")
    if isinstance(known, int) and known >= max(lengths):
        return known
    fitting = _fitting(job)
    found, ranks = allowed(lengths, epochs=given["epochs"], fitting=fitting), job.accelerator.num_processes
    while min(map(len, plan_by_tokens(lengths, batch_tokens=found, **given))) < ranks and found < sum(lengths):
        found *= 2  # every process needs a row of every step
    memory = "more than a pack has" if fitting is None else f"{fitting} tokens"
    log.info("optim.batch_tokens=auto: %d tokens a step at most (into memory fit %s)", found, memory)
    runs.write_json(job.run / "environment.json", {**record, "batch_tokens": found})
    return found


def _fitting(job: Job) -> int | None:
    """Tokens of a step that fit into memory, one pass a process and micro-batch; None if whole packs do."""
    asked = job.config["model"]["checkpoint_activations"]
    tokens = _fitting_pass(
        job,
        checkpointed=asked is True and job.method.checkpointable,
        num_parameters=job.base.num_parameters,
        trains_base=not job.method.leaves_base_intact,
    )
    if job.feeder.packed and tokens >= PACK_TOKENS[job.accelerator.device.type]:
        return None  # a larger step is several packs, one after the other
    real = tokens if job.feeder.packed else int((1 - WASTE) * tokens)
    return real * job.accelerator.num_processes * int(job.config["optim"]["accumulation"])


def _fitting_pass(job: Job, **sizes: Any) -> int:
    """Tokens of a pass that fit into the memory that is free now; `sizes` are those of `fitting_tokens`."""
    return fitting_tokens(
        Shape.of(job.base.model.config),
        free=_free_bytes(job.accelerator.device),
        number_bytes=4 if job.accelerator.mixed_precision == "no" else 2,
        **sizes,
    )


def _free_bytes(device: torch.device) -> int:
    """Of the device's memory; on a CPU of the host's."""
    if device.type != "cuda":
        return int(psutil.virtual_memory().available)
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0] + cached)


def _power_below(number: int) -> int:
    return 1 << (number.bit_length() - 1)


def _power_above(number: int) -> int:
    return 1 << (number - 1).bit_length()
