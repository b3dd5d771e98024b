"""Did the method take effect? Six findings of a run, recorded as `checks` in scores.json.

The probe is measured on the base twice (what two runs differ), on the model that the method made of it twice (a run
with learning rate 0 is that model again), on the tuned model, and on the tuned model read back from disk.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from finetune.evaluate import Answer
from finetune.methods.method import Finding
from finetune.probe import Probe, Said, State, Subject, answer, checksum, measure, reached, rounding, say, steps

log = logging.getLogger("finetune")

EFFECT = 100  # times what two runs of the base differ: less is no effect
UNTRAINED = Finding(None, "no weights of the model are trained")


def twice(probe: Probe, model: Any) -> tuple[State, State]:
    """A model before training, measured as two runs would."""
    return measure(probe, model), measure(probe, model)


def examine(
    probe: Probe,
    subject: Subject,
    before: Sequence[State],
    *,
    reload: Callable[[], Subject],
    optim: Mapping[str, Any],
) -> dict[str, dict[str, Any]]:
    """Every finding; `before` are the base twice and the model at its start twice, `reload` gives the saved model.

    A check that cannot be made is a finding too, and never ends the run.
    """
    method, (base, base_again, start, control) = subject.method, before
    # Measured by the first check that needs it.
    end, said = functools.cache(lambda: measure(probe, subject.model)), functools.cache(lambda: say(probe, subject))
    checks: dict[str, Callable[[], Finding]] = {
        "weights": lambda: weights(probe, subject, base, start, end()),
        "logits": lambda: logits(probe, subject, (base, base_again, start, end())) if method.trains else UNTRAINED,
        "loss": lambda: loss(start.losses, control.losses, end().losses) if method.trains else UNTRAINED,
        "cache": lambda: cache(probe, subject, said()),
        "reload": lambda: _reload(probe, subject, end(), said, reload),
        "method": lambda: of_method(probe, subject, end(), alpha=optim.get("neftune_alpha")),
    }
    return {name: asdict(_find(name, check)) for name, check in checks.items()}


def weights(probe: Probe, subject: Subject, base: State, start: State, end: State) -> Finding:
    """Only the method's weights receive gradients and changed; the base's did not."""
    trained = {key for key, weight in end.weights.items() if weight.parameter.requires_grad}
    names = {weight.name: weight for weight in start.weights.values()}
    # PEFT makes some of 4-bit weights anew, as they are: those are known by name.
    before = {key: start.weights.get(key) or names.get(weight.name) for key, weight in end.weights.items()}
    moved = {key for key, weight in end.weights.items() if _moved(weight.checksum, before[key])}
    own = base.weights
    changed = {key for key, weight in own.items() if checksum(weight.parameter) != weight.checksum}
    grown = reached(probe, subject.model) if trained else set()
    wrong = (moved | grown) - trained
    if subject.method.leaves_base_intact:
        wrong |= changed | ((trained | grown) & own.keys())
    if wrong:
        known = {**own, **end.weights}
        some = ", ".join(sorted(known[key].name for key in wrong)[:3])
        return Finding(False, f"{len(wrong)} tensors that are not the method's are trained or changed: {some}")
    kept = f"{len(own.keys() - changed)} of the base's {len(own)} tensors are as they were"
    if not subject.method.leaves_base_intact:
        kept += ", as this method changes the base's own"
    enough = 2 * len(trained & moved) >= len(trained) and bool(trained) == subject.method.trains
    return Finding(enough, f"{len(trained & moved)} of {len(trained)} trained tensors moved; {kept}")


def logits(probe: Probe, subject: Subject, states: Sequence[State]) -> Finding:
    """The start equals the base, where it should; the end differs from both by far more than two runs of the base."""
    base, again, start, end = (state.logits for state in states)
    scale = float(base.abs().max())
    noise = max(_apart(base, again), torch.finfo(torch.float32).eps * scale)
    first, last = _apart(start, base), min(_apart(end, base), _apart(end, start))
    same = first <= max(EFFECT * noise, rounding(probe, subject.model) * scale)
    note = f"the start differs from the base by {first:.2g}, the end by {last:.2g}; two runs of the base by {noise:.1g}"
    starts = subject.method.starts_as_base and subject.method.prefix_kv(subject.model) is None
    if not starts:
        note += "; this method does not start as the base"
    return Finding((same or not starts) and last > EFFECT * noise, note)


def loss(start: Tensor, control: Tensor, end: Tensor) -> Finding:
    """On rows of the training side the loss fell by more than it varies: by rounding, and from row to row."""
    fall = start - end  # (rows,)
    varies = float((control - start).abs().max())
    error = float(fall.std() / len(fall) ** 0.5) if len(fall) > 1 else 0.0
    note = (
        f"{start.mean():.3f} to {end.mean():.3f} nats on {len(fall)} training rows; "
        f"with learning rate 0 it varies by {varies:.1g}, the standard error of the fall is {error:.2g}"
    )
    return Finding(float(fall.mean()) > max(varies, 2 * error), note)


def cache(probe: Probe, subject: Subject, said: Said) -> Finding:
    """Neither the KV cache nor the other rows of a batch change a row's logits."""
    close, apart = rounding(probe, subject.model) * float(said.forced.abs().max()), _apart(said.cached, said.forced)
    note = f"in a batch with the cache, and by itself without, a row's logits differ by {apart:.2g} "
    return Finding(apart <= close, f"{note}(rounding: {close:.1g})")


def reloaded(probe: Probe, subject: Subject, end: State, ours: Said, again: Subject) -> Finding:
    """What was saved, put onto a fresh base, answers the same; near ties may fall either way."""
    found, theirs = measure(probe, again.model), [said for said, _ in answer(probe, again)]
    close = rounding(probe, subject.model) * float(end.logits.abs().max())
    apart, differing = _apart(found.logits, end.logits), _differing(ours.answers, theirs, ours.forced, close=close)
    note = f"read back, logits differ by {apart:.2g} (rounding: {close:.1g}), "
    note += f"{differing} of {len(theirs)} answers differ"
    return Finding(apart <= close and not differing, note)


def _reload(
    probe: Probe, subject: Subject, end: State, said: Callable[[], Said], reload: Callable[[], Subject]
) -> Finding:
    if not subject.method.answers:
        return reloaded(probe, subject, end, said(), reload()) if subject.method.trains else UNTRAINED
    assert probe.encode
    ours, theirs = (s.method.predict(s.model, probe.asked, encode=probe.encode) for s in (subject, reload()))
    differing = sum(one != other for one, other in zip(ours or [], theirs or [], strict=True))
    return Finding(not differing, f"read back, {differing} of {len(probe.asked)} answers differ")


def of_method(probe: Probe, subject: Subject, end: State, *, alpha: float | None) -> Finding:
    """What only the method can tell; and that NEFTune's noise is silent in evaluation."""
    found = [finding for finding in (subject.method.check(subject.model), prefixed(probe, subject)) if finding]
    if alpha and subject.method.trains:
        apart = _apart(measure(probe, subject.model).logits, end.logits)
        silent = apart <= rounding(probe, subject.model) * float(end.logits.abs().max())
        found.append(Finding(silent, f"NEFTune: two evaluations differ by {apart:.1g}"))
    if not found:
        return Finding(None, "this method has no check of its own")
    return Finding(all(finding.ok for finding in found), "; ".join(finding.note for finding in found))


@torch.no_grad()
def prefixed(probe: Probe, subject: Subject) -> Finding | None:
    """Is the prefix in the cache that a generation goes on with?"""
    prefix = subject.method.prefix_kv(subject.model)
    if prefix is None:
        return None
    ids = torch.tensor([probe.rows[0].ids[:3]], device=subject.model.device)
    found = subject.model(input_ids=ids, use_cache=True).past_key_values.get_seq_length() - ids.shape[1]
    return Finding(found == prefix.shape[3], f"{found} of {prefix.shape[3]} prefix positions in a generation's cache")


def _find(name: str, check: Callable[[], Finding]) -> Finding:
    try:
        found = check()
    except torch.OutOfMemoryError:
        found = Finding(None, "no memory left for this check")
    except Exception as error:  # hours of training are not lost because a check broke
        found = Finding(False, f"the check itself failed: {type(error).__name__}: {' '.join(str(error).split())[:200]}")
    if found.ok is False:
        log.warning("check %s FAILED: %s", name, found.note)
    return found


def _moved(now: int, before: Any) -> bool:
    return before is None or now != before.checksum


def _apart(one: Tensor, other: Tensor) -> float:
    """Largest difference; infinite where there are not even as many."""
    return float((one - other).abs().max()) if one.shape == other.shape else float("inf")


def _differing(ours: Sequence[Answer], theirs: Sequence[Answer], forced: Tensor, *, close: float) -> int:
    """Answers that part at a token that is no near tie; `forced` are the logits behind `ours`, one after another."""
    count, first = 0, 0
    for one, other in zip(ours, theirs, strict=True):
        pairs = zip([*one.ids, None], [*other.ids, None], strict=False)
        place = next((n for n, (a, b) in enumerate(pairs) if a != b), None)
        if place is not None:
            best = forced[first + min(place, steps(one) - 1)].topk(2).values
            count += bool(best[0] - best[1] > 2 * close)
        first += steps(one)
    return count
