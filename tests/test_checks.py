"""The guard: working methods pass it, and each deliberately broken one is found out."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from conftest import ARCHITECTURES, PACKED, tiny_base
from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig

from finetune import checks
from finetune.evaluate import Decoding
from finetune.feeder import Feeder
from finetune.loop import Loop
from finetune.methods.adalora import AdaLora
from finetune.methods.full import Full
from finetune.methods.method import trainable
from finetune.methods.none import Untouched
from finetune.methods.peft import Peft
from finetune.methods.prefix import Prefix
from finetune.probe import Probe, Subject, checksum, measure, say

OPTIM = {
    "optimizer": {"_target_": "torch.optim.AdamW", "weight_decay": 0.0},
    **{"schedule": "constant", "warmup": 0.0, "accumulation": 1, "max_grad_norm": 1.0, "loss_on": "target"},
    "validations": 0,
}


def lora(**changes):
    return LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear", **changes)


class Leaky(Peft):
    """Trains a weight of the base that it says to leave alone."""

    def attach(self, model, **options):
        tuned = super().attach(model, **options)
        model.get_input_embeddings().weight.requires_grad_(True)
        return tuned


class Vandal(Peft):
    """Changes a frozen weight."""

    def after_step(self, model, step):
        with torch.no_grad():
            next(p for p in model.parameters() if not p.requires_grad).mul_(1.01)


class Idle(Untouched):
    """Trains a weight that nothing uses."""

    trains = True

    def attach(self, model, **options):
        model.requires_grad_(False)
        model.register_parameter("idle", torch.nn.Parameter(torch.ones(2)))
        model.get_input_embeddings().register_forward_hook(lambda layer, ids, found: found + 0 * model.idle.sum())
        return model


class Hooked(Peft):
    """Changes what embeddings are looked up as `change(ids, embeddings)` says."""

    def __init__(self, change):
        super().__init__(lora())
        self.change = change

    def attach(self, model, **options):
        tuned = super().attach(model, **options)
        model.get_input_embeddings().register_forward_hook(lambda layer, ids, found: self.change(ids[0], found))
        return tuned


class Forgetful(Peft):
    """Reads nothing back."""

    def load(self, model, folder):
        return model


class NeverPruned(AdaLora):
    """Keeps all ranks."""

    def after_step(self, model, step):
        pass


def adalora(kind=AdaLora):
    sizes = {"init_r": 6, "target_r": 3, "tinit": 0.1, "tfinal": 0.3, "deltaT": 2, "orth_reg_weight": 0.5}
    return kind(task_type="CAUSAL_LM", target_modules="all-linear", **sizes)


def prefix():
    return Peft(PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))


def probe_of(examples, *, packed=False):
    rows = [SimpleNamespace(ids=[*e.ids, 2], num_prompt=e.num_prompt) for e in examples]
    decoding = Decoding(max_new_tokens=8, batch_rows=8, end_ids=(2,), pad_id=0)
    return Probe(Accelerator(cpu=True), rows[:8], rows, decoding, packed=packed)


def guarded(method, examples, tmp_path, *, architecture="qwen2", lr=1e-2, again=None, **optim):
    """The findings of twenty steps."""
    probe = probe_of(examples, packed=architecture in PACKED and method.padding_free)
    base = tiny_base(architecture)
    before = checks.twice(probe, base)
    torch.manual_seed(0)
    model = method.attach(base, tokenizer=None, num_steps=20, train_rows=())
    before += checks.twice(probe, model)
    accelerator = probe.accelerator
    feeder = Feeder(packed=False, pad_id=0, loss_on="target", device=accelerator.device)
    steps = [list(range(len(examples)))] * 20 if method.trains else []
    if steps:
        loop = Loop(method, accelerator, feeder, probe.seen, steps, OPTIM | optim, lr)
        model = loop.run(model, validate=float, record=lambda line: None)
    method.save(model, tmp_path)

    def reload():
        fresh = tiny_base(architecture)
        return Subject(method, method.load(fresh, tmp_path), fresh)

    return checks.examine(probe, Subject(method, model, base), before, reload=reload, optim=OPTIM | optim)


@pytest.mark.parametrize("architecture", PACKED)
@pytest.mark.parametrize("name", ["lora", "prompt", "own_prefix"])
def test_rows_measured_together_are_those_measured_alone(examples, name, architecture):
    made = {
        "lora": lambda: Peft(lora()),
        "prompt": lambda: Peft(PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)),
    }
    made["own_prefix"] = lambda: Prefix(num_virtual_tokens=4)
    method = made[name]()
    model = method.attach(tiny_base(architecture), tokenizer=None, num_steps=1, train_rows=())
    for weight in trainable(model):
        torch.nn.init.normal_(weight, std=0.3)
    alone, together = (measure(probe_of(examples, packed=packed), model) for packed in (False, True))
    torch.testing.assert_close(together.logits, alone.logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(together.losses, alone.losses, rtol=1e-5, atol=1e-6)
    assert len(set(alone.losses.tolist())) == len(examples)


def failed(findings):
    return {name for name, finding in findings.items() if finding["ok"] is False}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(
    "make_method",
    [lambda: Peft(lora()), Full, prefix, adalora, Untouched],
    ids=["lora", "full", "prefix", "adalora", "none"],
)
def test_what_works_passes(make_method, architecture, examples, tmp_path):
    found = guarded(make_method(), examples, tmp_path, architecture=architecture)
    assert not failed(found), found
    assert list(found) == ["weights", "logits", "loss", "cache", "reload", "method"]
    json.dumps(found, allow_nan=False)


def test_neftune_is_silent_in_evaluation(examples, tmp_path):
    found = guarded(Peft(lora()), examples, tmp_path, neftune_alpha=5.0)
    assert found["method"]["ok"], found
    assert "NEFTune" in found["method"]["note"]


BROKEN = {
    "a-base-weight-is-trained": (lambda: Leaky(lora()), {}, "weights"),
    "a-base-weight-changes": (lambda: Vandal(lora()), {}, "weights"),
    "nothing-is-reached": (Idle, {}, "weights"),
    "no-effect-on-logits": (Idle, {}, "logits"),
    "starts-elsewhere": (lambda: Peft(lora(init_lora_weights=False)), {}, "logits"),
    "the-loss-stays": (lambda: Peft(lora()), {"lr": 0.0}, "loss"),
    "the-cache-is-wrong": (lambda: Hooked(lambda ids, found: found * (1 + 4 * (ids.shape[1] == 1))), {}, "cache"),
    "the-batch-matters": (lambda: Hooked(lambda ids, found: found * (1 + 4 * (ids.shape[0] > 1))), {}, "cache"),
    "nothing-is-read-back": (lambda: Forgetful(lora()), {}, "reload"),
    "ranks-never-move": (lambda: adalora(NeverPruned), {}, "method"),
    "noise-in-evaluation": (
        lambda: Hooked(lambda ids, found: found + torch.rand_like(found)),
        {"neftune_alpha": 5.0},
        "method",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_is_broken_is_found_out(case, examples, tmp_path):
    make_method, options, name = BROKEN[case]
    found = guarded(make_method(), examples, tmp_path, **options)
    assert found[name]["ok"] is False, found
    assert "failed" not in found[name]["note"]


def test_a_prefix_that_is_not_in_the_cache_is_found_out():
    method = prefix()
    model = method.attach(tiny_base("qwen2"), tokenizer=None, num_steps=1, train_rows=())
    assert method.check(model).ok
    model.get_prompt = lambda *args, **options: None
    assert method.check(model).note.startswith("0 of 4")
    assert not method.check(model).ok


def test_a_check_that_breaks_does_not_end_the_run(examples, tmp_path):
    class Unreadable(Peft):
        def load(self, model, folder):
            raise OSError("no such file")

    found = guarded(Unreadable(lora()), examples, tmp_path)
    assert found["reload"] == {"ok": False, "note": "the check itself failed: OSError: no such file"}


def test_a_measurement_that_breaks_costs_its_checks_and_not_the_run(examples, tmp_path):
    """After hours of training the memory may be short by a few MiB, or a weight no number."""

    class Greedy(Peft):
        def after_step(self, model, step):
            def no_memory(*_):
                raise torch.OutOfMemoryError("by a few MiB")

            if step == 20:
                model.register_forward_hook(no_memory)

    found = guarded(Greedy(lora()), examples, tmp_path)
    assert {check["note"] for check in found.values()} == {"no memory left for this check"}
    assert all(check["ok"] is None for check in found.values())


def test_weights_that_are_no_numbers_are_a_finding_that_json_can_hold(examples, tmp_path):
    class Broken(Peft):
        def after_step(self, model, step):
            if step == 20:
                with torch.no_grad():
                    next(p for p in model.parameters() if p.requires_grad).fill_(float("nan"))

    found = guarded(Broken(lora()), examples, tmp_path)
    json.dumps(found, allow_nan=False)
    assert [found[name]["ok"] for name in ("logits", "loss", "reload")] == [False, False, False]


def test_measuring_changes_neither_weights_nor_random_numbers(examples):
    probe, base = probe_of(examples), tiny_base("llama")
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    one, two = measure(probe, base), measure(probe, base)
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(one.logits, two.logits)
    assert [weight.checksum for weight in one.weights.values()] == [weight.checksum for weight in two.weights.values()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8, torch.float64], ids=str)
def test_a_checksum_sees_one_changed_value(dtype):
    weight = torch.arange(24).reshape(4, 6).to(dtype)
    before = checksum(weight)
    assert checksum(weight.clone()) == before
    weight[2, 3] += 1
    assert checksum(weight) != before


READ = """
import sys, json, torch, transformers
sys.path[:0] = {path}
from test_checks import Peft, lora, probe_of, say, Subject
from types import SimpleNamespace
base = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])
examples = [SimpleNamespace(**row) for row in json.load(sys.stdin)]
method = Peft(lora())
said = say(probe_of(examples), Subject(method, method.load(base, sys.argv[2]), base))
print(json.dumps([answer.ids for answer in said.answers]))
"""


def test_a_fresh_process_reads_back_the_same_answers(examples, tmp_path):
    base, method = tiny_base("qwen2"), Peft(lora(init_lora_weights=False))
    base.save_pretrained(tmp_path / "base")
    model = method.attach(base, tokenizer=None, num_steps=1, train_rows=())
    method.save(model, tmp_path / "adapter")
    ours = [answer.ids for answer in say(probe_of(examples), Subject(method, model, base)).answers]
    script = READ.format(path=[str(Path(__file__).parent)])
    job = [sys.executable, "-c", script, str(tmp_path / "base"), str(tmp_path / "adapter")]
    given = json.dumps([vars(example) for example in examples])
    result = subprocess.run(job, input=given, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout.splitlines()[-1]) == ours


def test_near_ties_are_no_difference(examples):
    probe, base = probe_of(examples), tiny_base("qwen2")
    subject = Subject(Untouched(), base, base)
    end, said = checks.measure(probe, base), say(probe, subject)
    other = replace(said, answers=[replace(answer, ids=[5, *answer.ids[1:]]) for answer in said.answers])
    tied = replace(other, forced=said.forced * 0)
    assert checks.reloaded(probe, subject, end, tied, subject).ok
    assert not checks.reloaded(probe, subject, end, other, subject).ok
