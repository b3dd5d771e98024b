"""The package flash-attn-4: used where it is there and right, never where it is not."""

import os
import sys
from contextlib import nullcontext
from itertools import pairwise
from types import ModuleType

import pytest
import torch
from conftest import PACKED, tiny_base
from torch import nn

from finetune.data.batches import pack
from finetune.feeder import summed_loss
from finetune.graphs import compiled
from finetune.methods.blocks import blocks
from finetune.models import attention, fastest, flash
from finetune.models.attention import attending
from finetune.models.attention import causal as causal_mask


class Package(ModuleType):
    """What stands in for the package's interface, which needs a GPU: the same calls, row by row by the formulas."""

    wrong = wrong_prefixed = 0.0
    error: Exception | None = None

    def __init__(self, name):
        super().__init__(name)
        self.asked = []  # rows, and tokens of the longest

    def flash_attn_varlen_func(self, q, k, v, *, causal, return_lse, **options):
        assert causal
        assert return_lse
        if self.error:
            raise self.error
        assert_alike(q, k, v)
        self.asked.append((len(options["cu_seqlens_q"]) - 1, options["max_seqlen_q"]))
        outs, sums = [], []
        for scores, _, _, values, _ in each_row(q, k, v, **options):
            outs.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), values))
            sums.append(scores.logsumexp(-1))
        return torch.cat(outs).to(q.dtype), torch.cat(sums, 1)

    def _flash_attn_bwd(self, q, k, v, out, dout, lse, *, causal, **options):  # noqa: PLR0913
        """Dao et al. 2022, algorithm 4: probabilities come from the exponents' sums."""
        assert causal
        assert_alike(q, k, v, out, dout)
        found = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
        groups, scale = q.shape[1] // k.shape[1], options["softmax_scale"]
        for scores, queries, keys, values, (rows, columns) in each_row(q, k, v, **options):
            slope = dout[rows].float()
            chances = (scores - lse[:, rows, None]).exp()
            means = (slope * out[rows]).sum(-1).t()[:, :, None]
            inner = chances * (torch.einsum("qhd,khd->hqk", slope, values) - means) * scale
            found[0][rows] = torch.einsum("hqk,khd->qhd", inner, keys).to(q.dtype)
            for to, all_heads in (
                (found[1], torch.einsum("hqk,qhd->khd", inner, queries)),
                (found[2], torch.einsum("hqk,qhd->khd", chances, slope)),
            ):
                to[columns] = all_heads.unflatten(1, (-1, groups)).sum(2).to(k.dtype)
        return *found[:2], found[2] + self.wrong + (self.wrong_prefixed if len(k) > len(q) else 0.0)


def assert_alike(*tensors):
    assert all(tensor.is_contiguous() for tensor in tensors)
    assert len({tensor.dtype for tensor in tensors}) == 1


def each_row(q, k, v, *, cu_seqlens_q, cu_seqlens_k, softmax_scale, **_):
    """Scores (heads, queries, keys); queries, keys and values with as many heads; and where they lie."""
    groups = q.shape[1] // k.shape[1]
    for (i, j), (m, n) in zip(pairwise(cu_seqlens_q.tolist()), pairwise(cu_seqlens_k.tolist()), strict=True):
        queries, keys, values = q[i:j].float(), *(x[m:n].float().repeat_interleave(groups, 1) for x in (k, v))
        scores = torch.einsum("qhd,khd->hqk", queries, keys) * softmax_scale
        unseen = ~causal_mask(j - i, n - m, device=q.device)
        yield scores.masked_fill(unseen, -torch.inf), queries, keys, values, (slice(i, j), slice(m, n))


@pytest.fixture(autouse=True)
def _nothing_is_kept():
    """No test meets what another one's package was, or gave."""
    yield
    flash._kernels.cache_clear()
    fastest._apart.cache_clear()


@pytest.fixture
def package(monkeypatch):
    found = Package("flash_attn.cute.interface")
    for name in ("flash_attn", "flash_attn.cute"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    return as_it_were(found, monkeypatch)


def as_it_were(package, monkeypatch):
    """The package, or that it is missing, on a GPU that it is for."""
    monkeypatch.setitem(sys.modules, "flash_attn.cute.interface", package)
    monkeypatch.setattr(fastest, "_meant_for", lambda device: True)
    for name in ("ENABLED", "DIR"):
        monkeypatch.setenv(f"FLASH_ATTENTION_CUTE_DSL_CACHE_{name}", "")
    return package


def chosen(**changes):
    return fastest.fastest(tiny_base("qwen2"), **{"longest": 70, "rows": [5, 3, 4], **changes})


def test_it_is_used_where_it_gives_the_same(package, caplog):
    assert chosen() == flash.NAME
    assert not caplog.records
    assert set(package.asked) == {(3, 70), (5, 70)}
    assert chosen(longest=2, rows=[2]) == flash.NAME
    assert package.asked[-1] == (2, 2)


@pytest.mark.parametrize("possible", [True, False])
def test_its_kernels_are_kept_in_the_cache_folder(package, monkeypatch, tmp_path, possible):
    folder = tmp_path / "cache"
    if not possible:
        folder.write_text("no folder")
    monkeypatch.setenv("FINETUNE_CACHE", str(folder))
    monkeypatch.delenv("FLASH_ATTENTION_CUTE_DSL_CACHE_DIR")
    assert chosen() == flash.NAME
    told = os.environ.pop("FLASH_ATTENTION_CUTE_DSL_CACHE_DIR", None)
    assert told == (str(folder / "flash-attn-4") if possible else None)


def test_a_missing_package_is_no_news(monkeypatch, caplog):
    as_it_were(None, monkeypatch)
    assert chosen() == attention.NAME
    assert not caplog.records


@pytest.mark.parametrize("wrong", [0.1, float("nan")])
@pytest.mark.parametrize("where", ["wrong", "wrong_prefixed"])
def test_it_is_not_used_where_its_gradients_are_wrong(package, where, wrong, caplog):
    setattr(package, where, wrong)
    for _ in range(2):  # every run says so
        caplog.clear()
        assert chosen() == attention.NAME
        assert "of a norm off" in caplog.text


@pytest.mark.parametrize(
    "error", [RuntimeError("no compiler"), ModuleNotFoundError("no cutlass", name="cutlass"), AssertionError()]
)
def test_it_is_not_used_where_it_fails(package, error, caplog):
    package.error = error
    assert chosen() == attention.NAME
    assert repr(error) in caplog.text


def test_a_lack_of_memory_is_not_its_fault(package):
    package.error = torch.OutOfMemoryError("for a moment")
    with pytest.raises(torch.OutOfMemoryError):
        chosen()
    package.error = None
    assert chosen() == flash.NAME


def test_it_does_not_give_the_same_bits_each_time(package, monkeypatch):
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    assert chosen() == attention.NAME


def test_it_is_for_new_gpus(monkeypatch):
    assert not fastest._meant_for(torch.device("cpu"))
    for capability, meant in (((8, 9), False), ((9, 0), True), ((10, 0), True)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        assert fastest._meant_for(torch.device("cuda")) is meant


def loss_and_gradients(architecture, name, examples):
    model = tiny_base(architecture)
    with attending(model, name):
        loss = summed_loss(model, pack(examples))
    loss.backward()
    return loss.item(), {n: p.grad for n, p in model.named_parameters()}


@pytest.mark.parametrize("architecture", PACKED)
def test_a_base_that_attends_by_it_gives_the_same(package, architecture, examples):
    loss, gradients = loss_and_gradients(architecture, attention.NAME, examples)
    again, others = loss_and_gradients(architecture, flash.NAME, examples)
    assert again == pytest.approx(loss, rel=1e-6)
    for name, gradient in gradients.items():
        torch.testing.assert_close(others[name], gradient, rtol=1e-4, atol=1e-5, msg=name)


def test_a_compiled_base_that_attends_by_it_gives_the_same(package, examples, monkeypatch):
    plain = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda module: plain(module, backend="aot_eager", fullgraph=True))
    monkeypatch.setattr("finetune.graphs.compiled_loss", nullcontext)
    torch.compiler.reset()
    loss, gradients = loss_and_gradients("qwen2", attention.NAME, examples)
    model = tiny_base("qwen2")
    with attending(model, flash.NAME), compiled(blocks(model), model.get_input_embeddings()):
        again = summed_loss(model, pack(examples))
    again.backward()
    assert again.item() == pytest.approx(loss, rel=1e-6)
    for name, weight in model.named_parameters():
        torch.testing.assert_close(weight.grad, gradients[name], rtol=1e-4, atol=1e-5, msg=name)


def test_tensors_may_lie_in_any_order_and_precision(package):
    q, v = torch.randn(1, 4, 8, 16, requires_grad=True), torch.randn(1, 2, 8, 16, requires_grad=True)
    slope = torch.randn(1, 4, 8, 16).bfloat16().transpose(1, 2)
    bounds = torch.tensor([0, 5, 8], dtype=torch.int32)
    options = {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": 5, "max_length_k": 5}

    def found(attend):
        out, _ = attend(nn.Module(), q, v, v.bfloat16(), None, **options)
        return out, *torch.autograd.grad(out, (q, v), slope)

    ours, theirs = found(attention.packed_attention), found(flash.flash_attention)
    torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2)


def test_a_compiler_is_told_what_lies_where(package):
    q, k = torch.randn(8, 4, 16), torch.randn(8, 2, 16)
    bounds = torch.tensor([0, 5, 8], dtype=torch.int32)
    rest = (bounds, bounds, 5, 5, 0.25)
    out, sums = flash._rows(q, k, k, *rest)
    torch.library.opcheck(flash._rows, (q, k, k, *rest))
    torch.library.opcheck(flash._gradients, (torch.ones_like(q), q, k, k, out, sums, *rest))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("heads", [(14, 2, 64), (12, 2, 128), (28, 4, 128)])
@pytest.mark.parametrize(("longest", "rows"), [(40, 300), (200, 4), (1077, 12)])
def test_the_package_itself_gives_what_torch_gives(heads, longest, rows):
    pytest.importorskip("flash_attn.cute")
    assert flash._kernels()[0].__module__ == "flash_attn.cute.interface"
    for more in (0, fastest.PREFIX):
        assert fastest._apart(heads, torch.device("cuda", 0), longest=longest, rows=rows, more=more) <= fastest.NEAR
