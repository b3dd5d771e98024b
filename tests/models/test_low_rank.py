"""A frozen layer with a low-rank product beside it: the same however the weight has room for A or B."""

import pytest
import torch

from finetune.models import low_rank as written
from finetune.models.low_rank import low_rank

RANK, ROOM = 8, 64


def layer(outs, ins, room, bias, *, tokens=(2, 5)):
    torch.manual_seed(0)
    full = torch.randn(outs + ROOM * (room == "rows"), ins + ROOM * (room == "columns"), dtype=torch.float64)
    a, b = torch.randn(RANK, ins, dtype=torch.float64), torch.randn(outs, RANK, dtype=torch.float64)
    if room == "rows":
        full[outs : outs + RANK] = a
    if room == "columns":
        full[:, ins : ins + RANK] = b
    x = torch.randn(*tokens, ins, dtype=torch.float64)
    return x, full, torch.randn(outs, dtype=torch.float64) if bias else None, a, b


def on_gpu(tensors):
    return [None if tensor is None else tensor.cuda() for tensor in tensors]


CASES = [(32, 96, "rows"), (96, 32, "columns"), (48, 40, None)]


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize(("outs", "ins", "room"), CASES)
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("tokens", [(2, 5), (1, 1)], ids=["tokens", "token"])
def test_it_is_the_sum_of_both_products(outs, ins, room, bias, compiled, tokens):
    x, full, bias, a, b = layer(outs, ins, room, bias, tokens=tokens)
    asked = [each.requires_grad_() for each in (x, a, b)]
    expected = x @ full[:outs, :ins].t() + (x @ a.t()) @ b.t() + (0 if bias is None else bias)
    torch.compiler.reset()
    function = torch.compile(low_rank, backend="aot_eager") if compiled else low_rank
    found = function(x, full, bias, a, b)
    torch.testing.assert_close(found, expected)
    ours, theirs = (torch.autograd.grad(y.sin().sum(), asked) for y in (found, expected))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize(("outs", "ins", "room"), CASES)
def test_a_compiler_is_told_what_lies_where(outs, ins, room, bias):
    x, full, bias, a, b = layer(outs, ins, room, bias)
    torch.library.opcheck(written._product, (x, full, bias, a, b))
    inner = (x @ a.t()).flatten(0, 1)
    for onwards in (False, True):
        torch.library.opcheck(written._gradients, (x @ full[:outs, :ins].t(), x, inner, full, a, b, onwards))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("onwards", [False, True], ids=["last", "onwards"])
@pytest.mark.parametrize(("outs", "ins", "room"), CASES)
def test_a_graph_with_a_branch_gives_the_same(outs, ins, room, onwards):
    x, full, _, a, b = on_gpu(layer(outs, ins, room, bias=False))
    gradient, saved = torch.randn(2, 5, outs, device="cuda", dtype=x.dtype), (x, (x @ a.t()).flatten(0, 1), full, a, b)
    expected = written._backward(gradient, saved, onwards=onwards)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = written._backward(gradient, saved, onwards=onwards)
    graph.replay()
    torch.testing.assert_close(found, expected)
