"""What every method keeps, on random two-layer bases: the methods of the field on all four, the others on two."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from conftest import ARCHITECTURES, PACKED, tiny_base
from grid import FIELD, NAMES, OTHER_START, attach, config, logits, make, stored_base

from finetune import evaluate
from finetune.config import unsupported
from finetune.data.batches import pad
from finetune.feeder import Feeder, mean_loss, summed_loss
from finetune.loop import Loop
from finetune.methods.method import Method
from finetune.models.attention import packing

LACKING = [("bitfit", "llama")]  # (method, architecture): n/a, with a reason
CASES = [
    (name, architecture)
    for name in NAMES
    for architecture in (ARCHITECTURES if name in FIELD else ("qwen2", "bloom"))
    if (name, architecture) not in LACKING
]
OWN_WEIGHTS = ("full", "freeze", "bitfit")  # train the base's own
# Weights that may stay as they are: AdaLoRA's pruned singular values; what ShadowPEFT makes and never uses.
IDLE = {"adalora": ("lora_E",), "shadow": ("1.shadow_update", "shadow_backbone.default.word_embeddings")}
OPTIM = {
    "optimizer": {"_target_": "torch.optim.AdamW", "weight_decay": 0.0},
    **{"schedule": "constant", "warmup": 0.0, "accumulation": 1, "max_grad_norm": 1.0, "loss_on": "target"},
    "validations": 0,
}
NUM_STEPS = 20


@dataclass
class Tuned:
    """A method on a base, before and after its training."""

    name: str
    architecture: str
    method: Method
    base: Any
    model: Any
    examples: list
    feeder: Feeder
    base_logits: torch.Tensor
    start_logits: torch.Tensor
    start: dict[str, torch.Tensor]  # all parameters after attaching
    trained: set[str]  # names of those that require gradients
    own: list[Any]  # the base's parameters
    losses: tuple[float, float]  # validation loss before and after, nats per token


@pytest.fixture(scope="module", params=CASES, ids=["-".join(case) for case in CASES])
def tuned(request, rows, tmp_path_factory) -> Tuned:
    name, architecture = request.param
    found = config(name, architecture)["method"]
    base = stored_base(architecture, quantize=found["quantize"], folder=tmp_path_factory.mktemp("base"))
    own, method, ids = list(base.parameters()), make(name, architecture), torch.tensor([rows[1].ids])
    before = logits(base, ids)
    packed = method.padding_free and architecture in PACKED
    model = attach(method, base, num_steps=NUM_STEPS)
    accelerator = Accelerator(cpu=True)
    feeder = Feeder(packed=packed, pad_id=0, loss_on="target", device=accelerator.device)
    measure = {"feeder": feeder, "accelerator": accelerator}
    start = logits(model, ids)
    weights = {n: p.detach().clone() for n, p in model.named_parameters()}
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    first = mean_loss(model, rows, **measure)
    steps = [list(range(len(rows)))] * NUM_STEPS
    loop = Loop(method, accelerator, feeder, rows, steps, OPTIM, found["lr"]["tiny"])
    loop.run(model, validate=float, record=lambda line: None)
    losses = first, mean_loss(model, rows, **measure)
    return Tuned(name, architecture, method, base, model, rows, feeder, before, start, weights, trained, own, losses)


@pytest.fixture(scope="module")
def rows():
    """Rows of random tokens, even enough in length to be one padded batch: a step is one forward pass."""
    import random
    from types import SimpleNamespace

    draw = random.Random(0)
    lengths = (20, 24, 17, 22, 19)
    return [SimpleNamespace(ids=[draw.randrange(3, 96) for _ in range(n)], num_prompt=max(1, n // 2)) for n in lengths]


def test_starts_as_the_base_or_is_listed(tuned):
    difference = (tuned.start_logits - tuned.base_logits).abs().max().item()
    if tuned.name in OTHER_START:
        assert difference > 1e-5
    else:
        assert difference < 1e-5


def test_only_its_weights_are_trained(tuned):
    named = dict(tuned.model.named_parameters())
    assert tuned.trained
    if tuned.name not in OWN_WEIGHTS:
        assert not {id(named[n]) for n in tuned.trained} & {id(p) for p in tuned.own}
    moved = {n for n, p in named.items() if not torch.equal(p, tuned.start[n])}
    assert not moved - tuned.trained
    idle = tuned.trained - moved
    assert not [n for n in idle if not any(part in n for part in IDLE.get(tuned.name, ()))]


def test_the_loss_falls(tuned):
    before, after = tuned.losses
    assert after < before - 1e-3


def test_saved_and_loaded_onto_a_fresh_base_it_is_the_same(tuned, tmp_path):
    tuned.method.save(tuned.model, tmp_path / "adapter")
    assert list((tmp_path / "adapter").glob("*.safetensors"))
    quantize = config(tuned.name, tuned.architecture)["method"]["quantize"]
    base = stored_base(tuned.architecture, quantize=quantize, folder=tmp_path / "base")
    again = make(tuned.name, tuned.architecture).load(base, tmp_path / "adapter")
    ids = torch.tensor([tuned.examples[1].ids])
    torch.testing.assert_close(logits(again, ids), logits(tuned.model, ids), rtol=1e-4, atol=1e-5)


def test_generates_what_it_finds_most_likely(tuned):
    prompts = [row.ids[: row.num_prompt] for row in tuned.examples]
    decoding = evaluate.Decoding(max_new_tokens=5, batch_rows=4, end_ids=(2,), pad_id=0)
    answers = [a for batch in evaluate.predict(tuned.model, prompts, decoding) for a in batch]
    for answer in answers:
        prompt = prompts[answer.number]
        ids = torch.tensor([[*prompt, *answer.ids, *([2] if answer.finish_reason == "stop" else [])]])
        forced = logits(tuned.model, ids[:, :-1])[0, len(prompt) - 1 :]  # (new tokens, vocabulary)
        chosen = forced.gather(1, ids[0, len(prompt) :, None])[:, 0]
        assert (forced.max(dim=1).values - chosen).max() < 1e-4, answer


def test_a_pack_has_the_loss_of_padded_rows(tuned):
    batch = pad(tuned.examples, pad_id=0)
    tuned.model.eval()
    with torch.no_grad():
        padded = summed_loss(tuned.model, batch).item()
        single = sum(summed_loss(tuned.model, pad([row], pad_id=0)).item() for row in tuned.examples)
        assert padded == pytest.approx(single, rel=1e-5)
        if tuned.feeder.packed:
            [packed] = tuned.feeder.batches(tuned.examples)
            with packing(tuned.model):
                assert summed_loss(tuned.model, packed).item() == pytest.approx(single, rel=1e-5)


def test_recomputed_activations_give_the_same_gradients(tuned):
    if not tuned.method.checkpointable:
        return
    plain = gradients(tuned)
    tuned.base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    try:
        recomputed = gradients(tuned)
    finally:
        tuned.base.gradient_checkpointing_disable()
    assert plain.keys() == recomputed.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(recomputed[name], gradient, rtol=1e-4, atol=1e-5, msg=name)


def gradients(tuned: Tuned) -> dict[str, torch.Tensor]:
    torch.manual_seed(3)
    tuned.model.train()
    tuned.model.zero_grad()
    summed_loss(tuned.model, pad(tuned.examples, pad_id=0)).backward()
    found = {n: p.grad.clone() for n, p in tuned.model.named_parameters() if p.grad is not None}
    tuned.model.zero_grad()
    return found


@pytest.mark.parametrize(("name", "architecture"), LACKING, ids=["-".join(case) for case in LACKING])
def test_what_a_base_lacks_is_said(name, architecture):
    assert "needs bias, which llama does not have" in unsupported(config(name, architecture))
    with pytest.raises(ValueError, match="no biases"):
        attach(make(name, architecture), tiny_base(architecture))
