"""How large a step is: what statistics, memory and the rows themselves allow."""

from types import SimpleNamespace

import pytest
import transformers
from hypothesis import given
from hypothesis import strategies as st

from finetune import budget, runs
from finetune.budget import allowed, fitting_tokens
from finetune.models.shape import Shape

GIB = 2**30
SMALL = Shape(layers=24, width=896, feed_forward=4864, vocabulary=151936)  # Qwen2.5-0.5B
LARGE = Shape(layers=28, width=3584, feed_forward=18944, vocabulary=152064)  # 7B
BFLOAT16 = {"number_bytes": 2, "checkpointed": False}


@pytest.mark.parametrize(
    ("shape", "parameters", "tokens", "gib"),
    [(SMALL, 494e6, 16384, 30), (SMALL, 494e6, 32768, 58), (LARGE, 7.6e9, 8192, 71), (LARGE, 7.6e9, 16384, 128)],
    ids=["0.5B-16k", "0.5B-32k", "7B-8k", "7B-16k"],
)
def test_the_estimate_is_near_what_was_measured(shape, parameters, tokens, gib):
    """Measured on an H200: PEFT's LoRA under autocast, 14 % of the tokens supervised, whole logits, autograd's loss."""
    logits = 14 * 0.14 * tokens * shape.vocabulary
    estimate = tokens * shape.bytes_per_token(**BFLOAT16) + 2 * parameters + logits
    assert estimate / GIB == pytest.approx(gib, rel=0.1)


@pytest.mark.parametrize(
    ("shape", "parameters", "free", "trains_base", "power"),
    [
        (SMALL, 494e6, 138, False, 65536),
        (SMALL, 494e6, 23, False, 8192),
        (SMALL, 494e6, 14, False, 4096),
        (SMALL, 494e6, 23, True, 4096),
        (LARGE, 7.6e9, 125, False, 8192),
        (LARGE, 7.6e9, 64, False, 4096),
        (LARGE, 7.6e9, 64, True, 0),
    ],
)
def test_what_fits_into_the_memory_that_is_free(shape, parameters, free, trains_base, power):
    sizes = {"num_parameters": int(parameters), "free": int(free * GIB), "trains_base": trains_base}
    found = fitting_tokens(shape, **sizes, **BFLOAT16)
    assert power <= found < max(2 * power, 1)


def test_less_is_kept_with_checkpoints_and_more_in_float32():
    plain = SMALL.bytes_per_token(**BFLOAT16)
    assert SMALL.bytes_per_token(number_bytes=2, checkpointed=True) < plain / 8
    assert SMALL.bytes_per_token(number_bytes=4, checkpointed=False) == 2 * plain


def test_the_shape_of_every_base_is_known():
    assert Shape.of(transformers.BloomConfig(hidden_size=64, n_layer=3, vocab_size=99)) == Shape(3, 64, 256, 99)
    for config in (transformers.Qwen2Config(), transformers.LlamaConfig(), transformers.GlmConfig()):
        shape = Shape.of(config)
        assert shape.feed_forward == config.intermediate_size
        assert shape.layers == config.num_hidden_layers


@given(
    st.lists(st.integers(1, 2000), min_size=1, max_size=60),
    st.floats(0.1, 200),
    st.one_of(st.none(), st.integers(0, 40_000)),
)
def test_auto_is_a_power_of_two_within_its_bounds(lengths, epochs, fitting):
    found = allowed(lengths, epochs=epochs, fitting=fitting)
    assert found.bit_count() == 1
    assert max(lengths) <= found
    if found >= 2 * max(lengths):  # it is not the longest row that decides
        assert found <= budget.MOST_TOKENS
        assert found * budget.FEWEST_STEPS <= epochs * sum(lengths)
        assert fitting is None or found <= fitting


def test_auto_takes_all_that_is_allowed():
    lengths = [240] * 3900
    assert allowed(lengths, epochs=2, fitting=None) == 16384
    assert allowed(lengths, epochs=2, fitting=15000) == 8192
    assert allowed(lengths, epochs=1, fitting=None) == 8192  # 114 steps
    assert allowed(lengths[:60], epochs=1, fitting=None) == 256  # one row a step


def test_a_row_that_no_step_holds_is_named():
    said = r"optim.batch_tokens=100: 2 training rows are longer, the longest \(c\) has 170 tokens; set .*=170"
    with pytest.raises(ValueError, match=said):
        budget.refuse_long_rows([3, 120, 170], batch_tokens=100, ids=["a", "b", "c"])
    budget.refuse_long_rows([3, 100], batch_tokens=100, ids=["a", "b"])


def test_a_step_that_not_every_process_has_a_row_of_is_refused():
    with pytest.raises(ValueError, match=r"step 2 has 1 rows, fewer than .*=2 .* try optim.batch_tokens=200"):
        budget.refuse_short_steps([[1, 2], [3]], batch_tokens=100, ranks=2)
    budget.refuse_short_steps([[1, 2], [3]], batch_tokens=100, ranks=1)


@pytest.mark.parametrize(("ranks", "expected"), [(1, 256), (2, 512)])
def test_auto_records_the_budget_that_gives_every_process_a_row(tmp_path, monkeypatch, ranks, expected):
    monkeypatch.setattr(budget, "_fitting", lambda job: None)
    runs.write_json(tmp_path / "environment.json", {"precision": "float32"})
    alone = SimpleNamespace(run=tmp_path, accelerator=SimpleNamespace(num_processes=ranks))
    lengths, plan = [240] * 60, {"epochs": 1, "max_steps": None, "seed": 1}
    assert budget._decided(alone, lengths, plan) == expected
    record = runs.read_json(tmp_path / "environment.json")
    assert (record["batch_tokens"], record["precision"]) == (expected, "float32")


def test_the_largest_pass_is_a_share_of_a_step():
    lengths, steps = [10, 200, 30, 40, 50], [[0, 1, 2], [3, 4]]
    assert budget.largest_pass(lengths, steps, parts=1, most=4096) == 240
    assert budget.largest_pass(lengths, steps, parts=2, most=4096) == 200
    assert budget.largest_pass(lengths, steps, parts=1, most=100) == 200  # rows are never split
    assert budget.largest_pass(lengths, steps, parts=1, most=None) == 600  # padded


@pytest.mark.parametrize(
    ("asked", "gib", "expected"), [("auto", 8, False), ("auto", 1, True), (True, 8, True), (False, 1, False)]
)
def test_activations_are_recomputed_where_they_would_not_fit(tmp_path, monkeypatch, asked, gib, expected):
    monkeypatch.setattr(budget, "_free_bytes", lambda device: gib * GIB)
    runs.write_json(tmp_path / "environment.json", {"precision": "float32"})
    config = {"model": {"checkpoint_activations": asked}, "method": {"name": "m"}, "optim": {"accumulation": 1}}
    base = transformers.Qwen2Config(hidden_size=896, intermediate_size=4864, num_hidden_layers=24, vocab_size=512)
    job = SimpleNamespace(
        run=tmp_path,
        config=config,
        main=True,
        accelerator=SimpleNamespace(num_processes=1, device=SimpleNamespace(type="cpu"), mixed_precision="bf16"),
        method=SimpleNamespace(checkpointable=True, leaves_base_intact=True),
        base=SimpleNamespace(model=SimpleNamespace(config=base), num_parameters=1000),
        feeder=SimpleNamespace(packed=True, most_tokens=4096),
        train_rows=[SimpleNamespace(ids=range(240))] * 8,
    )
    assert budget.recomputes(job, [list(range(8))], num_trained=10**6) is expected
    monkeypatch.setattr(budget, "_free_bytes", lambda device: (9 - gib) * GIB)
    assert (
        budget.recomputes(job, [list(range(8))], num_trained=10**6) is expected
    )  # what a run that is gone on with did
    job.method.checkpointable = False
    assert not budget.recomputes(job, [list(range(8))], num_trained=10**6)
    assert not budget.recomputes(job, [], num_trained=10**6)
