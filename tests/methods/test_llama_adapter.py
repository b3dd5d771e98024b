import pytest
import torch
from conftest import ARCHITECTURES, PACKED, tiny_base
from exactness import assert_a_pack_is_its_rows, assert_learns, assert_same
from grid import attach, logits, stored_base, varied_base
from peft import AdaptionPromptConfig, PeftModel, get_peft_model
from torch.nn.functional import softmax

from finetune.data.batches import pad
from finetune.feeder import summed_loss
from finetune.methods.blocks import attention, blocks
from finetune.methods.build import build
from finetune.methods.llama_adapter import LlamaAdapter
from finetune.methods.method import trainable


def method(**changes):
    return LlamaAdapter(**({"adapter_len": 6, "adapter_layers": 2} | changes))


def randomised(model):
    """Open gates, so that the prompts say something."""
    generator = torch.Generator().manual_seed(2)
    for parameter in trainable(model):
        parameter.data.normal_(generator=generator)
    return model


def weights(model):
    return {n.removeprefix("base_model.model."): p for n, p in model.named_parameters() if "adaption" in n}


def gradients(model):
    found = {n: p.grad.clone() for n, p in weights(model).items()}
    model.zero_grad()
    return found


@pytest.mark.parametrize("layers", [1, 2])
def test_on_llama_it_is_pefts(layers, examples):
    ours = randomised(attach(method(adapter_layers=layers), varied_base("llama")))
    config = AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=6, adapter_layers=layers)
    theirs = get_peft_model(varied_base("llama"), config)
    theirs.load_state_dict({f"base_model.model.{n}": p for n, p in weights(ours).items()}, strict=False)
    batch = pad(examples, pad_id=0)
    losses = [summed_loss(model, batch) for model in (ours, theirs)]
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(logits(ours, batch.ids), logits(theirs, batch.ids), rtol=1e-4, atol=1e-5)
    assert_same(gradients(ours), gradients(theirs))


def test_peft_loads_what_llama_learnt(tmp_path, examples):
    ours = randomised(attach(method(), varied_base("llama")))
    method().save(ours, tmp_path)
    theirs = PeftModel.from_pretrained(varied_base("llama"), tmp_path)
    ids = pad(examples, pad_id=0).ids
    torch.testing.assert_close(logits(theirs, ids), logits(ours, ids), rtol=1e-4, atol=1e-5)


def by_hand(module, query):
    """The paper's equation for one head after another; query (tokens, heads, size) before any rotation."""
    size, prompt = module.head_dim, module.adaption_prompt[0]
    if hasattr(module, "query_key_value"):
        fused = module.query_key_value(prompt).view(len(prompt), -1, 3, size)
        keys, values = fused[:, :, 1], fused[:, :, 2]
    else:
        keys, values = (layer(prompt).view(len(prompt), -1, size) for layer in (module.k_proj, module.v_proj))
    group = query.shape[1] // keys.shape[1]
    said = [
        softmax(query[:, h] @ keys[:, h // group].T / size**0.5, dim=-1) @ values[:, h // group]
        for h in range(query.shape[1])
    ]
    return module.adaption_gate * torch.cat(said, dim=-1)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_it_adds_the_papers_equation(architecture):
    """At the first position, which rotary embeddings leave as it is."""
    base = varied_base(architecture)
    ids, inputs = torch.tensor([[7]]), []
    module = attention(blocks(base)[-1])
    module.register_forward_pre_hook(
        lambda _, args, kwargs: inputs.append((*args, kwargs.get("hidden_states"))[0]), with_kwargs=True
    )
    project = module.dense if architecture == "bloom" else module.o_proj
    heads = []
    project.register_forward_hook(lambda _, args, output: heads.append(args[0]))
    logits(base, ids)
    model = randomised(attach(method(adapter_layers=1), base))
    logits(model, ids)
    torch.testing.assert_close(inputs[0], inputs[1])
    if architecture == "bloom":
        query = module.query_key_value(inputs[0])[0].view(1, -1, 3, module.head_dim)[:, :, 0]
    else:
        query = module.q_proj(inputs[0])[0].view(1, -1, module.head_dim)
    torch.testing.assert_close(heads[1][0] - heads[0][0], by_hand(module, query), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("architecture", PACKED)
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointed"])
def test_a_pack_has_the_loss_and_gradients_of_single_rows(architecture, checkpointing, examples):
    model = randomised(attach(method(), varied_base(architecture))).train()
    assert_a_pack_is_its_rows(model, examples, checkpointing=checkpointing)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_cache_changes_nothing(architecture, examples):
    model = randomised(attach(method(), varied_base(architecture)))
    ids = torch.tensor([examples[1].ids[:12]])
    with torch.no_grad():
        first = model(input_ids=ids[:, :7], use_cache=True)
        steps = [first.logits]
        cache = first.past_key_values
        steps += [model(input_ids=ids[:, n : n + 1], past_key_values=cache).logits for n in range(7, 12)]
    torch.testing.assert_close(torch.cat(steps, dim=1), logits(model, ids), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("quantize", ["nf4", "int8"])
@pytest.mark.parametrize("architecture", ["glm", "bloom"])
def test_learns_on_a_quantized_base(architecture, quantize, tmp_path, examples):
    base = stored_base(architecture, quantize=quantize, folder=tmp_path)
    ids = pad(examples, pad_id=0).ids
    before = logits(base, ids)
    model = attach(method(), base)
    torch.testing.assert_close(logits(model, ids), before)
    assert_learns(model, examples, lr=3e-2)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_prompts_stay_in_float32_in_a_half_precision_base(architecture, examples):
    model = randomised(attach(method(), tiny_base(architecture).bfloat16()))
    assert {p.dtype for p in trainable(model)} == {torch.float32}
    assert logits(model, pad(examples, pad_id=0).ids).dtype == torch.bfloat16
    exact = randomised(attach(method(), tiny_base(architecture)))
    batch = pad(examples, pad_id=0)
    with torch.autocast("cpu", torch.bfloat16):
        half = summed_loss(exact.train(), batch)
    assert half.item() == pytest.approx(summed_loss(exact, batch).item(), rel=1e-2)


@pytest.mark.parametrize(("layers", "expected"), [(0.9375, 2), (0.5, 1), (0.01, 1), (1, 1), (2, 2)])
def test_layers_are_a_share_or_a_number(layers, expected):
    model = attach(method(adapter_layers=layers), tiny_base("qwen2"))
    assert sum(p.numel() for p in trainable(model)) == expected * (6 * 32 + 1)
    assert not weights(model).keys() - {f"model.layers.{n}.self_attn.adaption_{w}" for n in (0, 1) for w in KINDS}


KINDS = ("prompt", "gate")


@pytest.mark.parametrize(
    ("changes", "said"),
    [({"adapter_len": 0}, "adapter_len=0"), ({"adapter_layers": 1.5}, "a share"), ({"adapter_layers": 0}, "a share")],
)
def test_refuses(changes, said):
    arguments = {"adapter_len": 6, "adapter_layers": 2} | changes
    with pytest.raises(ValueError, match=said):
        build({"name": "m", "adapter": {"_target_": "finetune.methods.llama_adapter.LlamaAdapter", **arguments}})


def test_more_layers_than_the_base_has_are_refused():
    with pytest.raises(ValueError, match="2 blocks"):
        attach(method(adapter_layers=3), tiny_base("qwen2"))


def test_weights_of_another_method_are_refused(tmp_path):
    method().save(attach(method(), tiny_base("qwen2")), tmp_path)
    with pytest.raises(ValueError, match="another method or base"):
        method(adapter_layers=1).load(tiny_base("qwen2"), tmp_path)
