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
from finetune.graphs import IGNORED, Graphs, Shapes, Size, Work, compiled, quickest
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
    assert gradients.recorded([[0]], [], asked=asked, alike=1) is gradients
    assert len(caplog.records) == (asked == "compiled")
    gradients = replace(gradients, begun="compiled")  # as it was when the run began
    assert gradients.recorded([[0]], [], asked=asked, alike=1) is gradients
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == (2 if asked == "compiled" else 1)
    assert all(text.startswith(f"steps are eager and not compiled (launch.step={asked}), as ") for text in said)
    assert all(why in text for text in said)
    assert not recordable()._unrecordable()


class NoGraphs:
    """Says how it was asked to compute steps."""

    def __init__(self, shapes, *, way, **_):
        self.shapes, self.way = shapes, way

    def capture(self):
        """There is no GPU to record anything."""


@pytest.fixture
def some(monkeypatch, examples):
    """A run of three rows in two steps whose layers may be compiled, and bytes of its activations."""
    monkeypatch.setattr("finetune.gradients.Graphs", NoGraphs)
    monkeypatch.setattr("finetune.gradients.compiled", lambda *_: nullcontext())
    base = tiny_base("qwen2")
    feeder = Feeder(packed=True, pad_id=0, loss_on="target", device=torch.device("cpu"))
    gradients = replace(recordable(), base=base, model=base, feeder=feeder, examples=examples)
    layer = 18 * base.config.hidden_size + 10 * base.config.intermediate_size
    num_tokens = sum(len(example.ids) for example in examples[:3])
    return replace(gradients, optim={"accumulation": 1}), layer * base.config.num_hidden_layers * num_tokens


def found_way(gradients, *, asked="auto", alike=1):
    return gradients.recorded([[0, 1], [2]], [], asked=asked, alike=alike).way


def test_layers_that_are_left_as_they_are_are_said(some, caplog):
    gradients = replace(some[0], method=SimpleNamespace(replayable={"graph"}))
    for begun, asked, said in ((None, "graph", 0), (None, "compiled", 1), ("compiled", "auto", 1)):
        caplog.clear()
        assert found_way(replace(gradients, begun=begun), asked=asked) == "graph"
        words = f"(launch.step={asked}), as this method's are not compiled"
        assert sum(words in record.getMessage() for record in caplog.records) == said


def test_a_run_goes_on_as_it_began(some):
    assert found_way(some[0]) == "eager"  # a few rows
    for line in ({}, {"micro_batch_tokens": 50, "micro_batch_halvings": 1}):
        begun = some[0].as_after([{"way": "graph", **line}])
        assert found_way(begun) == "graph"
        assert found_way(begun, asked="eager") == "eager"


@pytest.mark.parametrize(
    ("share", "alike", "found"), [(0.999, 3, "compiled"), (1.001, 3, "graph"), (0.999, 2, "graph")]
)
def test_what_is_compiled_is_earned_back_by_runs_alike(some, monkeypatch, share, alike, found):
    gradients, num_bytes = some
    constants = {"SECONDS_LAUNCHED": 1e9, "SECONDS_COMPILE": 2.0, "SECONDS_CACHED": 0.5}  # of three runs alike: 1 s
    for name, value in (constants | {"BYTES_SPARED": share * num_bytes}).items():
        monkeypatch.setattr(f"finetune.graphs.{name}", value)
    assert found_way(gradients, alike=alike) == found


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
    ("num_packs", "num_layers", "num_bytes", "found", "as_they_are"),
    [
        (4, 24, 1e9, "eager", "eager"),  # a few
        (200, 24, 6e11, "graph", "graph"),
        (750, 24, 2.3e12, "graph", "graph"),  # 2000 rows x 3 epochs, 8 rows a step, of Qwen2.5-0.5B
        (750, 28, 4.8e12, "graph", "graph"),  # of 1.5B
        (750, 28, 1.04e13, "graph", "graph"),  # of 7B
        (3000, 28, 4.1e13, "compiled", "graph"),  # of 7B, 8000 rows
        (9000, 24, 2.7e13, "compiled", "graph"),
        (100, 28, 1e13, "eager", "eager"),  # packs so large that the GPU is not waited for
        (100, 28, 4e13, "compiled", "eager"),
    ],
)
def test_the_longer_the_run_the_more_is_prepared(num_packs, num_layers, num_bytes, found, as_they_are):
    work = Work(num_packs, 13, num_layers, num_bytes)
    assert quickest(work, compilable=True, alike=1) == found
    assert quickest(work, compilable=False, alike=1) == as_they_are


def test_cells_alike_earn_back_their_layers_together():
    for num_bytes, needed in ((4.8e12, 24), (1.04e13, 3)):  # 2000 rows x 3 epochs of Qwen2.5-1.5B and 7B
        work = Work(750, 13, 28, num_bytes)
        ways = [quickest(work, compilable=True, alike=number) for number in range(1, 40)]
        assert ways == ["graph"] * (needed - 1) + ["compiled"] * (40 - needed)


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
