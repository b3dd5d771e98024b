"""Filled packs give what packs give; on a GPU, replayed graphs give what eager steps give."""

from contextlib import nullcontext
from dataclasses import replace
from functools import partialmethod
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from conftest import PACKED, tiny_base
from grid import attach, config, make
from torch._dynamo.testing import CompileCounter

from finetune.data.batches import pack, plan, supervised
from finetune.feeder import Feeder, summed_loss
from finetune.gradients import Gradients
from finetune.graphs import IGNORED, Graphs, Shapes, Size, compiled, way
from finetune.loop import Loop
from finetune.methods.blocks import blocks
from finetune.methods.method import trainable
from finetune.models.attention import packing
from finetune.models.tokenizer import Example

METHODS = ("lora", "adapter", "full", "llama_adapter", "prefix", "prompt")
OPTIM = {
    "optimizer": {"_target_": "torch.optim.AdamW", "weight_decay": 0.0},
    **{"schedule": "constant", "warmup": 0.0, "accumulation": 2, "max_grad_norm": 1.0, "loss_on": "target"},
    "validations": 2,
}


def size(rows):
    return Size(sum(len(row.ids) for row in rows), len(rows), sum(len(supervised(r, loss_on="target")) for r in rows))


def loss_and_gradients(method, base, batch):
    model = attach(make(method, "qwen2"), base)
    with packing(model.get_base_model() if hasattr(model, "get_base_model") else model):
        loss = summed_loss(model, batch)
    loss.backward()
    return loss.item(), {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("architecture", PACKED)
@pytest.mark.parametrize("method", METHODS)
def test_a_filled_pack_has_the_same_loss_and_gradients(method, architecture, examples):
    batch = pack(examples)
    filled = Shapes.of([size(examples), size(examples[:3])], longest=40).fill(batch)
    assert filled.ids.shape[1] > batch.ids.shape[1]
    loss, gradients = loss_and_gradients(method, tiny_base(architecture), batch)
    again, others = loss_and_gradients(method, tiny_base(architecture), filled)
    assert again == pytest.approx(loss, rel=1e-6)
    for name, gradient in gradients.items():
        torch.testing.assert_close(others[name], gradient, rtol=1e-4, atol=1e-5, msg=name)


def recordable(**changes):
    """What `recorded` asks of a run before it looks at its packs, as on a GPU where all is well."""
    found = {"device": "cuda", "precision": "bf16", "processes": 1, "packed": True, "ways": {"graph", "compiled"}}
    found |= {"alpha": None, "int8": False, **changes}
    accelerator = SimpleNamespace(
        device=torch.device(found["device"]),
        mixed_precision=found["precision"],
        num_processes=found["processes"],
    )
    base = SimpleNamespace(is_loaded_in_8bit=found["int8"])
    method, feeder = SimpleNamespace(replayable=found["ways"]), SimpleNamespace(packed=found["packed"])
    return Gradients(base, base, method, accelerator, feeder, [], {"neftune_alpha": found["alpha"]})


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"device": "cpu"}, "no GPU"),
        ({"precision": "fp16"}, "not bfloat16"),
        ({"processes": 2}, "several processes"),
        ({"packed": False}, "padded"),
        ({"ways": {"decode"}}, "this method's"),
        ({"alpha": 5.0}, "neftune_alpha"),
        ({"int8": True}, "int8"),
    ],
)
@pytest.mark.parametrize("asked", ["auto", "compiled"])
def test_steps_that_cannot_be_recorded_are_eager_and_say_why(change, why, asked, caplog):
    gradients = recordable(**change)
    assert gradients.recorded([[0]], [], asked=asked) is gradients
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == (asked == "compiled")
    assert all(text.startswith("launch.step=compiled: eager steps, as ") and why in text for text in said)
    assert not recordable()._unrecordable()


class NoGraphs:
    """Says how it was asked to compute steps."""

    def __init__(self, shapes, *, way, **_):
        self.way = way

    def capture(self):
        """There is no GPU to record anything."""


def test_layers_that_are_left_as_they_are_are_said(monkeypatch, caplog, examples):
    monkeypatch.setattr("finetune.gradients.Graphs", NoGraphs)
    base = tiny_base("qwen2")
    feeder = Feeder(packed=True, pad_id=0, loss_on="target", device=torch.device("cpu"))
    gradients = replace(recordable(ways={"graph"}), base=base, model=base, feeder=feeder, examples=examples)
    gradients = replace(gradients, optim={"accumulation": 1})
    for asked, said in (("graph", 0), ("compiled", 1)):
        assert gradients.recorded([[0, 1], [2]], [], asked=asked).way == "graph"
        assert sum("launch.step=compiled" in record.getMessage() for record in caplog.records) == said
    assert gradients.recorded([[0, 1], [2]], [], asked="auto") is gradients  # a few rows are eager
    begun = gradients.as_after([{"way": "graph"}])
    assert begun.recorded([[0, 1], [2]], [], asked="auto").way == "graph"  # a run goes on as it began
    assert begun.recorded([[0, 1], [2]], [], asked="eager").way == "eager"
    gradients = replace(gradients, method=SimpleNamespace(replayable={"graph", "compiled"}))
    monkeypatch.setattr("finetune.gradients.compiled", lambda *_: nullcontext())
    monkeypatch.setattr("finetune.gradients.fastest", lambda *_, **__: "packed")
    monkeypatch.setattr("finetune.graphs.BYTES_SPARED", 1.0)
    assert gradients.recorded([[0, 1], [2]], [], asked="auto").way == "compiled"


@pytest.mark.parametrize("architecture", PACKED)
@pytest.mark.parametrize("method", ["lora", "adalora", "adapter", "full", "llama_adapter", "prefix", "prompt"])
def test_all_layers_are_compiled_as_one(method, architecture, monkeypatch):
    counter = CompileCounter()
    monkeypatch.setattr(torch.nn.Module, "compile", partialmethod(torch.nn.Module.compile, backend=counter))
    torch.compiler.reset()
    model = attach(make(method, architecture), tiny_base(architecture))
    layers = blocks(model.get_base_model() if hasattr(model, "get_base_model") else model)
    with compiled(layers, model.get_input_embeddings()):
        model.train()(input_ids=torch.tensor([[5, 6, 7, 8]]), use_cache=False).logits.sum().backward()
    assert len(layers) > 1
    assert counter.frame_count == 1


def test_rooms_hold_every_pack_of_the_plan(examples):
    parts = [examples[i:j] for i in range(12) for j in range(i + 1, 13)]
    shapes = Shapes.of([size(part) for part in parts], longest=40)
    for part in parts:
        filled = shapes.fill(pack(part))
        room = shapes.rooms[filled.ids.shape[1]]
        assert filled.bounds.shape == (room.rows + 1,)
        assert filled.kept.shape == filled.labels.shape == (room.kept,)
        assert int((filled.labels != IGNORED).sum()) == size(part).kept
        assert filled.bounds[-1] == filled.ids.shape[1]
        assert int(filled.bounds.diff().max()) <= filled.longest
        empty = shapes.empty(filled.ids.shape[1])
        assert empty.bounds.shape == filled.bounds.shape


@pytest.mark.parametrize(
    ("num_packs", "num_bytes", "found"),
    [
        (4, 1e9, "eager"),  # a few
        (200, 6e11, "graph"),
        (750, 2.3e12, "graph"),  # 2000 rows x 3 epochs, 8 rows a step, of Qwen2.5-0.5B
        (750, 1.5e13, "compiled"),  # of larger layers
        (9000, 2.7e13, "compiled"),  # of many more
        (4, 1e14, "compiled"),  # in few but large packs
    ],
)
def test_the_longer_the_run_the_more_is_prepared(num_packs, num_bytes, found):
    sizes = {"num_packs": num_packs, "num_buckets": 6, "num_layers": 24, "num_bytes": num_bytes}
    assert way(**sizes, compilable=True, alike=1) == found
    assert way(**sizes, compilable=False, alike=1) in ("eager", "graph")


def test_runs_alike_earn_back_their_layers_together():
    sizes = {"num_packs": 750, "num_buckets": 6, "num_layers": 28, "num_bytes": 4.7e12, "compilable": True}  # 1.5B
    assert [way(**sizes, alike=number) for number in (1, 2, 5, 6, 9)] == ["graph"] * 3 + ["compiled"] * 2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(
    ("method", "how"),
    [
        *((method, "graph") for method in (*METHODS, "adalora", "dora", "ptuning")),
        *((method, "compiled") for method in ("lora", "prefix", "prompt")),
    ],
)
def test_replayed_steps_are_the_eager_ones(method, how, examples):
    def losses(way, lr):
        accelerator = Accelerator(mixed_precision="bf16")
        feeder = Feeder(packed=True, pad_id=0, loss_on="target", device=accelerator.device)
        steps = plan(len(examples), epochs=4, batch_rows=4, max_steps=None, seed=1)
        found = make(method, "qwen2")
        model = attach(found, tiny_base("qwen2").cuda(), num_steps=len(steps)).cuda()
        loop = Loop(found, accelerator, feeder, examples, steps, OPTIM, lr, way=way)
        lines = []
        loop.run(model, validate=lambda _: 0.0, record=lines.append)
        assert {line["way"] for line in lines} == {way}
        return [line["loss"] for line in lines]

    lr = config(method, "qwen2")["method"]["lr"]["tiny"]
    eager, still = losses("eager", lr), losses("eager", 0.0)
    moved = max(abs(a - b) / b for a, b in zip(eager, still, strict=True))
    # bfloat16 has eight bits; steps that did nothing would be seen
    assert losses(how, lr) == pytest.approx(eager, rel=min(2e-2, moved / 4))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_graphs_that_were_abandoned_leave_nothing(examples):
    device = torch.device("cuda")
    model = attach(make("lora", "qwen2"), tiny_base("qwen2").cuda()).cuda()
    weights, drawn = list(trainable(model)), torch.cuda.get_rng_state()
    shapes = Shapes.of([size(examples)], longest=40)

    def loss(batch):
        torch.rand(3, device=device)
        raise torch.OutOfMemoryError

    graphs = Graphs(shapes, way="graph", loss=loss, weights=weights, device=device)
    with pytest.raises(torch.OutOfMemoryError):
        graphs.capture()
    assert not graphs.recording
    graphs.abandon()
    assert all(weight.grad is None for weight in weights)
    assert torch.equal(torch.cuda.get_rng_state(), drawn)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("method", ["lora", "full", "prompt"])
def test_a_replayed_loss_in_parts_is_the_eager_one_at_once(method, examples):
    device, batch = torch.device("cuda"), pack(examples)
    model = attach(make(method, "qwen2"), tiny_base("qwen2").cuda()).cuda()
    weights = list(trainable(model))

    def loss(some, **limits):
        with torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
            return summed_loss(model, some, **limits)

    shapes = Shapes.of([size(examples)], longest=40)
    graphs = Graphs(shapes, way="graph", loss=lambda some: loss(some, most=96 * 5), weights=weights, device=device)
    with packing(model.get_base_model() if hasattr(model, "get_base_model") else model):
        graphs.capture()
        found = graphs(batch, scale=0.5).item()
        replayed = [weight.grad.clone() for weight in weights]
        graphs.zero()
        expected = loss(batch.to(device))
        (expected * 0.5).backward()
    assert found == pytest.approx(expected.item(), rel=1e-3)
    for gradient, weight in zip(replayed, weights, strict=True):
        torch.testing.assert_close(gradient, weight.grad, rtol=2e-2, atol=2e-2 * float(weight.grad.abs().max()))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_recording_needs_no_more_memory_than_the_largest_pack():
    device = torch.device("cuda")
    weight = torch.nn.Parameter(torch.ones((), device=device))

    def loss(batch):
        return (weight * torch.ones(batch.ids.shape[1], 2**16, device=device)).sum()

    rows = [Example([1] * 520, 500, prompt_cut=False, target_cut=False)] * 5  # 2600 tokens
    shapes = Shapes.of([size(rows), Size(2400, 5, 5), Size(3000, 5, 5)], longest=520)
    graphs = Graphs(shapes, way="graph", loss=loss, weights=[weight], device=device)
    largest = 2 * 3072 * 2**18  # bytes of the factor and of the product
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_reserved()
    graphs.capture()
    assert largest <= torch.cuda.max_memory_reserved() - before < 1.2 * largest
    assert graphs(pack(rows), scale=1.0).item() == pytest.approx(2816 * 2**16)
    assert weight.grad.item() == pytest.approx(2816 * 2**16)
