"""Bases of true shapes with random weights, whose answers have given lengths: see benchmarks.rows."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

from benchmarks.rows import END, MOST, PAD, word

SHAPES: dict[str, dict[str, Any]] = {  # of Qwen2.5
    "tiny": {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
             "intermediate_size": 256, "tie_word_embeddings": True, "vocab_size": 512},
    "0.5B": {"hidden_size": 896, "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2,
             "intermediate_size": 4864, "tie_word_embeddings": True, "vocab_size": 151936},
    "1.5B": {"hidden_size": 1536, "num_hidden_layers": 28, "num_attention_heads": 12, "num_key_value_heads": 2,
             "intermediate_size": 8960, "tie_word_embeddings": True, "vocab_size": 151936},
    "7B": {"hidden_size": 3584, "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4,
           "intermediate_size": 18944, "tie_word_embeddings": False, "vocab_size": 152064},
}  # fmt: skip
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# Standard deviation of an embedding that announces a length (others have 0.02, and the head is often tied to them), and
# the strength with which the next one is written: the random layers between then leave it readable.
LOUD, STRENGTH = 0.1, 0.3
# Before the answer nothing but a space: the prompt ends with the word that announces its length.
TEMPLATE = (
    "{% for message in messages %}{{ message['content'] }}"
    "{{ ' ' if message['role'] == 'user' else eos_token }}{% endfor %}"
)


def device() -> str:
    """Where everything runs."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def vocab_size(shape: str) -> int:
    """Tokens that the shape knows."""
    return int(SHAPES[shape]["vocab_size"])


def base(shape: str, *, dtype: torch.dtype) -> Any:
    """Random weights, made on the device."""
    torch.manual_seed(0)
    config = transformers.Qwen2Config(
        **SHAPES[shape], max_position_embeddings=4096, architectures=["Qwen2ForCausalLM"], pad_token_id=PAD,
        eos_token_id=END, bos_token_id=None,
    )  # fmt: skip
    with torch.device(device()):
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            network = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
        finally:
            torch.set_default_dtype(before)
    _count_down(network)
    return network


@torch.no_grad()
def _count_down(network: Any) -> None:
    """After token END + n comes END + n - 1, whatever was before.

    Unit n of the first feed-forward layer answers to the embedding of END + n and adds that of END + n - 1.
    """
    embeddings, head = network.get_input_embeddings().weight, network.get_output_embeddings().weight
    loud = torch.randn(MOST + 1, embeddings.shape[1], generator=torch.Generator().manual_seed(1)).to(embeddings) * LOUD
    embeddings[END : END + MOST + 1] = loud
    head[END : END + MOST + 1] = loud
    layer = network.model.layers[0].mlp
    for part in (layer.gate_proj, layer.up_proj):
        part.weight[:MOST] = loud[1:] / loud[1:].norm(dim=1, keepdim=True)
    layer.down_proj.weight[:, :MOST] = loud[:-1].T * STRENGTH


def stored(shape: str) -> Path:
    """A folder with such a base in bfloat16 and its tokenizer, written once."""
    folder = Path(tempfile.gettempdir()) / "finetune-benchmarks" / shape
    if not (folder / "model.done").exists():
        base(shape, dtype=torch.bfloat16).save_pretrained(folder)
        words = tokenizer(vocab_size(shape))
        words.chat_template = TEMPLATE
        words.save_pretrained(folder)
        (folder / "model.done").touch()
    return folder


def tokenizer(size: int) -> Any:
    """One word a token."""
    special = {"<pad>": PAD, "<|endoftext|>": END, "<unk>": size - 1}
    words = {word(token): token for token in range(END + 1, size - 1)}
    inner = Tokenizer(models.WordLevel({**special, **words}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="<|endoftext|>", unk_token="<unk>"
    )


def quantized(network: Any) -> Any:
    """The linear layers of the blocks in 4-bit NormalFloat with double quantisation."""
    from bitsandbytes.nn import Linear4bit

    for block in network.model.layers:
        for part in (block.self_attn, block.mlp):
            for name, layer in list(part.named_children()):
                if isinstance(layer, torch.nn.Linear):
                    how = {"compute_dtype": torch.bfloat16, "compress_statistics": True, "quant_type": "nf4"}
                    new = Linear4bit(layer.in_features, layer.out_features, layer.bias is not None, **how)
                    new.load_state_dict(layer.state_dict())
                    setattr(part, name, new.to(layer.weight.device))
    return network
