"""The package flash-attn-4: used where it is there and right, never where it is not."""

import sys
from itertools import pairwise
from types import ModuleType

import pytest
import torch
from conftest import PACKED, tiny_base

from finetune.data.batches import pack
from finetune.feeder import summed_loss
from finetune.models import flash
from finetune.models.attention import FLASH, NAME, attending, flash_agrees, packing
from finetune.models.attention import causal as causal_mask

CPU = torch.device("cpu")


class Package(ModuleType):
    """What stands in for the package's interface, which needs a GPU: the same calls, row by row by the formulas."""

    wrong = 0.0

    def flash_attn_varlen_func(self, q, k, v, *, causal, return_lse, **options):
        assert causal
        assert return_lse
        outs, sums = [], []
        for scores, _, _, values, _ in each_row(q, k, v, **options):
            outs.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), values))
            sums.append(scores.logsumexp(-1))
        return torch.cat(outs).to(q.dtype), torch.cat(sums, 1)

    def _flash_attn_bwd(self, q, k, v, out, dout, lse, *, causal, **options):  # noqa: PLR0913
        """Dao et al. 2022, algorithm 4: probabilities come from the exponents' sums."""
        assert causal
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
        return *found[:2], found[2] + self.wrong


def each_row(q, k, v, *, cu_seqlens_q, cu_seqlens_k, softmax_scale, **_):
    """Scores (heads, queries, keys); queries, keys and values with as many heads; and where they lie."""
    groups = q.shape[1] // k.shape[1]
    for (i, j), (m, n) in zip(pairwise(cu_seqlens_q.tolist()), pairwise(cu_seqlens_k.tolist()), strict=True):
        queries, keys, values = q[i:j].float(), *(x[m:n].float().repeat_interleave(groups, 1) for x in (k, v))
        scores = torch.einsum("qhd,khd->hqk", queries, keys) * softmax_scale
        unseen = ~causal_mask(j - i, n - m, device=q.device)
        yield scores.masked_fill(unseen, -torch.inf), queries, keys, values, (slice(i, j), slice(m, n))


@pytest.fixture
def package(monkeypatch):
    found = Package("flash_attn.cute.interface")
    for name in ("flash_attn", "flash_attn.cute"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, found.__name__, found)
    monkeypatch.setenv("FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED", "0")
    monkeypatch.setenv("FLASH_ATTENTION_CUTE_DSL_CACHE_DIR", "")
    forget()
    yield found
    forget()


def forget():
    flash._kernels.cache_clear()
    flash_agrees.cache_clear()


def test_without_the_package_nothing_is_said(monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "flash_attn.cute.interface", None)  # importing it is an ImportError
    monkeypatch.setenv("FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED", "0")
    monkeypatch.setenv("FLASH_ATTENTION_CUTE_DSL_CACHE_DIR", "")
    forget()
    assert not flash_agrees(4, 2, 8, CPU)
    assert not caplog.records


def test_it_is_used_where_it_gives_the_same(package, caplog):
    assert flash_agrees(4, 2, 8, CPU)
    assert not caplog.records


@pytest.mark.parametrize("wrong", [0.1, float("nan")])
def test_it_is_not_used_where_its_gradients_are_wrong(package, wrong, caplog):
    package.wrong = wrong
    assert not flash_agrees(4, 2, 8, CPU)
    assert "flash-attn-4" in caplog.text


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("no compiler for this GPU"),
        ModuleNotFoundError("no cutlass", name="cutlass"),
        ImportError("no lib"),
    ],
)
def test_it_is_not_used_where_it_fails(package, monkeypatch, error, caplog):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(Package, "flash_attn_varlen_func", fail)
    assert not flash_agrees(4, 2, 8, CPU)
    assert str(error) in caplog.text


@pytest.mark.parametrize("flashing", [False, True], ids=["packed", "flash"])
def test_only_gpus_get_it(package, flashing):
    model = tiny_base("qwen2")
    with packing(model, flash=flashing):
        assert model.config._attn_implementation == NAME


@pytest.mark.parametrize("architecture", PACKED)
def test_a_base_that_attends_by_it_gives_the_same(package, architecture, examples):
    def found(name):
        model = tiny_base(architecture)
        with attending(model, name):
            loss = summed_loss(model, pack(examples))
        loss.backward()
        return loss.item(), {n: p.grad for n, p in model.named_parameters()}

    (loss, gradients), (again, others) = found(NAME), found(FLASH)
    assert again == pytest.approx(loss, rel=1e-6)
    for name, gradient in gradients.items():
        torch.testing.assert_close(others[name], gradient, rtol=1e-4, atol=1e-5, msg=name)


def test_a_compiler_is_told_what_lies_where(package):
    q, k = torch.randn(8, 4, 16), torch.randn(8, 2, 16)
    bounds = torch.tensor([0, 5, 8], dtype=torch.int32)
    rest = (bounds, bounds, 5, 5, 0.25)
    out, sums = flash._rows(q, k, k, *rest)
    torch.library.opcheck(flash._rows, (q, k, k, *rest))
    torch.library.opcheck(flash._gradients, (torch.ones_like(q), q, k, k, out, sums, *rest))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(("heads", "key_heads", "size"), [(14, 2, 64), (12, 2, 128), (28, 4, 128)])
def test_the_package_itself_gives_what_torch_gives(heads, key_heads, size, caplog):
    pytest.importorskip("flash_attn.cute")
    assert flash_agrees(heads, key_heads, size, torch.device("cuda", 0)), caplog.text
