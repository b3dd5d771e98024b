import pytest
import torch
from conftest import tiny_base
from peft import get_peft_model

from finetune.data.batches import pack, pad
from finetune.feeder import summed_loss
from finetune.methods.build import build
from finetune.methods.method import trainable
from finetune.models.attention import packing

LORA = {"_target_": "peft.LoraConfig", "task_type": "CAUSAL_LM", "r": 4, "target_modules": ["q_proj", "v_proj"]}
ADALORA = {
    "_target_": "finetune.methods.adalora.AdaLora",
    "task_type": "CAUSAL_LM",
    "init_r": 6,
    "target_r": 2,
    "tinit": 0.1,
    "tfinal": 0.3,
    "deltaT": 1,
    "orth_reg_weight": 0.5,
    "target_modules": ["q_proj", "v_proj"],
}


def attached(adapter, *, num_steps=20):
    method = build({"name": "m", "adapter": adapter})
    torch.manual_seed(0)
    return method, method.attach(tiny_base("qwen2"), tokenizer=None, num_steps=num_steps, train_rows=())


def test_an_argument_that_peft_does_not_know_is_named():
    with pytest.raises(ValueError, match=r"lora.*rank"):
        build({"name": "lora", "adapter": {**LORA, "rank": 4}})


def test_a_word_where_a_number_is_wanted_is_refused():
    with pytest.raises(ValueError, match=r"^method\.adapter\.r=four: lora wants int$"):
        build({"name": "lora", "adapter": {**LORA, "r": "four"}})


def test_adalora_refuses_shares_that_leave_no_step():
    with pytest.raises(ValueError, match="sum to less than 1"):
        build({"name": "adalora", "adapter": {**ADALORA, "tinit": 0.8}})


def test_adalora_penalty_is_what_peft_adds_to_its_own_loss(examples):
    method, model = attached(ADALORA)
    batch = pad(examples, pad_id=0)
    labels = batch.ids.masked_fill(batch.mask == 0, -100)
    theirs = model(input_ids=batch.ids, attention_mask=batch.mask, labels=labels).loss
    plain = model.base_model.model(input_ids=batch.ids, attention_mask=batch.mask, labels=labels).loss
    assert method.penalty(model).item() == pytest.approx((theirs - plain).item(), rel=1e-5)


def test_adalora_weighs_and_prunes_as_peft_does(examples):
    """Bit by bit, also where the ranks are settled: what takes few operations here takes thousands there."""
    (ours, model), (_, theirs) = attached(ADALORA), attached(ADALORA)
    allocator = theirs.base_model.rankallocator
    del allocator.update_ipt, allocator.mask_using_rank_pattern  # PEFT's own again
    for step in range(1, 21):
        for tuned in (model, theirs):
            tuned.zero_grad()
            summed_loss(tuned, pad(examples, pad_id=0)).backward()
            with torch.no_grad():
                for weight in trainable(tuned):
                    weight -= 1e-3 * weight.grad
        ours.after_step(model, step)
        theirs.base_model.update_and_allocate(step)
        for name in ("ipt", "exp_avg_ipt", "exp_avg_unc"):
            mine, other = (getattr(tuned.base_model.rankallocator, name) for tuned in (model, theirs))
            assert mine.keys() == other.keys()
            assert all(torch.equal(mine[key], other[key]) for key in other)
        for mine, other in zip(trainable(model), trainable(theirs), strict=True):
            assert torch.equal(mine, other)
    assert model.peft_config["default"].rank_pattern == theirs.peft_config["default"].rank_pattern
    assert sum(int((e == 0).sum()) for n, e in model.named_parameters() if "lora_E" in n) > 0


def test_adalora_ranks_reach_the_budget(examples):
    method, model = attached(ADALORA)
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    model.train()
    for step in range(1, 21):
        (summed_loss(model, pad(examples, pad_id=0)) / 100 + method.penalty(model)).backward()
        optimizer.step()
        method.after_step(model, step)
        optimizer.zero_grad()
    ranks = [int((e != 0).sum()) for n, e in model.named_parameters() if "lora_E" in n]
    assert sum(ranks) == 2 * len(ranks)


def test_saved_weights_give_the_same_logits(tmp_path, examples):
    method, model = attached(LORA)
    for parameter in trainable(model):
        torch.nn.init.normal_(parameter, std=0.1)
    method.save(model, tmp_path)
    again = build({"name": "m", "adapter": LORA}).load(tiny_base("qwen2"), tmp_path)
    ids = pad(examples, pad_id=0).ids
    torch.testing.assert_close(again(ids).logits, model(ids).logits)
    assert [p.name for p in tmp_path.glob("*.safetensors")] == ["adapter_model.safetensors"]


def test_kasa_penalty_is_the_papers(examples):
    beta, gamma = 1e-2, 1e-3
    method, model = attached({**LORA, "kasa_config": {"beta": beta, "gamma": gamma}})
    for parameter in trainable(model):
        torch.nn.init.normal_(parameter, std=0.1)
    named = dict(model.named_parameters())
    eye, expected = torch.eye(4), 0.0
    for name, diagonal in named.items():
        if "lora_diag" in name:
            a, b = (named[name.replace("lora_diag.default", f"{part}.default.weight")] for part in ("lora_A", "lora_B"))
            orthogonal = (b.T @ b - eye).norm() + (a @ a.T - eye).norm()
            expected = expected + beta * (diagonal**2).sum() + gamma * orthogonal
    assert method.penalty(model).item() == pytest.approx(expected.item(), rel=1e-5)
    assert attached(LORA)[0].penalty(model) == 0.0


def test_monteclora_penalty_reaches_its_noise_and_cannot_be_checkpointed(examples):
    method, model = attached({**LORA, "monteclora_config": {"num_samples": 4, "kl_loss_weight": 1.0}})
    assert not method.checkpointable
    summed_loss(model.train(), pad(examples, pad_id=0))
    model.zero_grad()
    method.penalty(model).backward()
    reached = {n.split(".")[-1] for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert reached
    assert not any("lora_A" in name or "lora_B" in name for name in reached)


@pytest.mark.parametrize(
    ("changes", "intact"),
    [
        ({}, True),
        ({"init_lora_weights": "orthogonal"}, True),
        ({"init_lora_weights": "pissa"}, False),
        ({"init_lora_weights": "olora"}, False),
        ({"kasa_config": {}}, False),
    ],
    ids=["lora", "orthogonal", "pissa", "olora", "kasa"],
)
def test_a_start_that_moves_the_base_says_so(changes, intact):
    base = tiny_base("qwen2")
    before = base.model.layers[0].self_attn.q_proj.weight.clone()
    method = build({"name": "m", "adapter": {**LORA, **changes}})
    method.attach(base, tokenizer=None, num_steps=1, train_rows=())
    after = base.model.layers[0].self_attn.q_proj.base_layer.weight
    assert torch.equal(before, after) == method.leaves_base_intact == intact


def test_a_target_inside_an_argument_stays_data():
    """Only the outer `_target_` is checked against the allowed ones."""
    inner = {"_target_": "os.getcwd"}
    assert build({"name": "m", "adapter": {**LORA, "rank_pattern": inner}}).config.rank_pattern == inner


def test_a_config_keeps_peft_types():
    method, model = attached(LORA)
    assert isinstance(model, type(get_peft_model(tiny_base("qwen2"), method.config)))
    assert all(p.dtype == torch.float32 for p in trainable(model))


@pytest.mark.parametrize(
    ("changes", "architecture"),
    [({"modules_to_save": ["self_attn"]}, "qwen2"), ({"layer_replication": [[0, 2], [1, 2]]}, "llama")],
    ids=["a copied attention", "copied blocks"],
)
def test_a_pack_is_its_rows_also_in_what_peft_copied(changes, architecture, examples):
    method = build({"name": "m", "adapter": {**LORA, "target_modules": ["down_proj"], **changes}})
    model = method.attach(tiny_base(architecture), tokenizer=None, num_steps=1, train_rows=()).train()
    for weight in trainable(model):
        torch.nn.init.normal_(weight, std=0.2)
    with method.lean(model):
        found = summed_loss(model, pad(examples, pad_id=0))
        with packing(model.get_base_model()):
            packed = summed_loss(model, pack(examples))
    assert packed.item() == pytest.approx(found.item(), rel=1e-5)
    assert summed_loss(model, pad(examples, pad_id=0)).item() == pytest.approx(
        found.item(), rel=1e-5
    )  # PEFT's own layers


@pytest.mark.parametrize("changes", [{"modules_to_save": ["norm"]}, {"bias": "all"}, {"bias": "lora_only"}])
def test_what_is_trained_of_the_base_wants_it_in_float32(changes):
    assert not build({"name": "m", "adapter": {**LORA, **changes}}).leaves_base_intact
    assert build({"name": "m", "adapter": LORA}).leaves_base_intact
