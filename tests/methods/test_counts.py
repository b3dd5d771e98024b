"""How many weights every method trains, in closed form: (in, out) of its linear layers, width d, blocks L."""

import math

import pytest
from conftest import tiny_base
from grid import NAMES, attach, config, make
from torch import nn

from finetune.methods.blocks import blocks
from finetune.methods.method import trainable

ARCHITECTURES = ("qwen2", "bloom")
SHAPES = {  # (in, out, has a bias) of the linear layers of a block: width 32, keys 16, feed-forward 64 or 128
    "qwen2": [
        *((32, 32, True), (32, 16, True), (32, 16, True), (32, 32, False)),
        *((32, 64, False), (32, 64, False), (64, 32, False)),
    ],
    "bloom": [(32, 96, True), (32, 32, True), (32, 128, True), (128, 32, True)],
}
L, D = 2, 32
KEYS = {"qwen2": 16, "bloom": 32}  # width of the keys: what a prefix holds of each layer, and again for the values
BLOCK = {  # all weights of a block: biases and norms too
    "qwen2": sum(i * o + o * b for i, o, b in SHAPES["qwen2"]) + 2 * D,
    "bloom": sum(i * o + o for i, o, b in SHAPES["bloom"]) + 4 * D,
}


def split(size):
    """The most even a x b = size, a <= b."""
    a = next(a for a in range(math.isqrt(size), 0, -1) if size % a == 0)
    return a, size // a


def lokr(i, o, r):
    (a, c), (b, d) = split(o), split(i)
    return a * b + (c * d if r >= max(c, d) / 2 else r * (c + d))


def low_rank(i, o, b, c):
    return c["r"] * (i + o)


# method -> weights of one linear layer with i inputs and o outputs, b: it has a bias, c: the method's arguments
PER_LAYER = {
    **dict.fromkeys(
        (
            *("lora", "lora_plus", "lora_orthogonal", "rslora", "qlora", "pissa", "olora", "velora", "delta_lora"),
            *("hira", "deft", "shira"),
        ),
        low_rank,
    ),
    "dora": lambda i, o, b, c: c["r"] * (i + o) + o,
    "kasa": lambda i, o, b, c: c["r"] * (i + o + 1),
    "delora": lambda i, o, b, c: c["r"] * (i + o) + 1,
    "mica": lambda i, o, b, c: c["r"] * i,
    "bdlora": lambda i, o, b, c: c["r"] * i + c["r"] * o // c["use_bdlora"]["nblocks"],
    "monteclora": lambda i, o, b, c: c["r"] * (i + o + 1) + c["monteclora_config"]["num_samples"],
    "adalora": lambda i, o, b, c: c["init_r"] * (i + o + 1),
    "gralora": lambda i, o, b, c: c["r"] * (i + o),
    "glora": lambda i, o, b, c: 2 * c["r"] * (i + o) + b * (c["r"] * (i + 1) + 2),
    "loha": lambda i, o, b, c: 2 * c["r"] * (i + o),
    "lokr": lambda i, o, b, c: lokr(i, o, c["r"]),
    "peanut": lambda i, o, b, c: 2 * c["r"] * o,
    "miss": lambda i, o, b, c: c["r"] * o,
    "vera": lambda i, o, b, c: c["r"] + o,
    "pvera": lambda i, o, b, c: 2 * c["r"] + o,
    "randlora": lambda i, o, b, c: math.ceil(min(i, o) / c["r"]) * (c["r"] + min(i, o)),
    "oft": lambda i, o, b, c: i * (c["oft_block_size"] - 1) // 2,
    "boft": lambda i, o, b, c: i * c["boft_block_size"] + o,
    "hra": lambda i, o, b, c: c["r"] * i,
    "psoft": lambda i, o, b, c: c["r"] * (c["r"] - 1) // 2 + 2 * c["r"],
    "road": lambda i, o, b, c: o,
    "beft": lambda i, o, b, c: o,
    "c3a": lambda i, o, b, c: i * o // c["block_size"],
    "fourierft": lambda i, o, b, c: c["n_frequency"],
    "waveft": lambda i, o, b, c: c["n_frequency"],
    "tinylora": lambda i, o, b, c: c["u"],
    "frod": lambda i, o, b, c: i + int(i * i * c["sparse_rate"]),
    "osf": lambda i, o, b, c: (min(i, o) - min(i, o) // 2) * (i + o + 1),
    "supertuning": lambda i, o, b, c: int(i * o * (1 - c["sparsity"])),
    "vblora": lambda i, o, b, c: c["r"] * (i + o) // c["vector_length"] * c["num_vectors"],
}
BIASES = {"qwen2": L * (D + 2 * 16), "bloom": (11 * L + 2) * D}
NORMS = {"qwen2": (2 * L + 1) * D, "bloom": 2 * (2 * L + 2) * D}
SCALED = {"qwen2": 2 * 16 + 64, "bloom": 3 * D + 4 * D}  # keys, values (BLOOM: queries) and the feed-forward's inside


def prefix(a, c):  # through the projection: n embeddings of the keys' width, and two layers
    n, wide, h = c["num_virtual_tokens"], KEYS[a], c["encoder_hidden_size"]
    return n * wide + wide * h + h + h * 2 * L * wide + 2 * L * wide


def ptuning(a, c):  # n embeddings and three layers
    n, h = c["num_virtual_tokens"], c["encoder_hidden_size"]
    return n * D + (D * h + h) + (h * h + h) + (h * D + D)


def adapter(a, c):
    return L * len(c["places"]) * (2 * D * c["size"] + D + c["size"])


# method -> all its weights; a: architecture, c: arguments
IN_ALL = {
    "full": lambda a, c: sum(p.numel() for p in tiny_base(a).parameters()),
    "freeze": lambda a, c: c["num_blocks"] * BLOCK[a],
    "llama_pro": lambda a, c: math.ceil(L / c["every"]) * BLOCK[a],
    "bitfit": lambda a, c: BIASES[a],
    "ln_tuning": lambda a, c: NORMS[a],
    "ia3": lambda a, c: L * SCALED[a],
    **dict.fromkeys(("adapter", "adapter_pfeiffer", "adapter_parallel"), adapter),
    "prompt": lambda a, c: c["num_virtual_tokens"] * D,
    "ptuning": ptuning,
    "prefix": prefix,
    "ptuning_v2": lambda a, c: c["num_virtual_tokens"] * 2 * L * KEYS[a],
    "cartridge": lambda a, c: (c["num_virtual_tokens"] - c["num_frozen_tokens"]) * 2 * L * KEYS[a],
    "llama_adapter": lambda a, c: round(c["adapter_layers"] * L) * (c["adapter_len"] * D + 1),
    "unilora": lambda a, c: c["theta_d_length"],
    "lora_qkv": lambda a, c: L * sum(c["r"] * (i + o) for i, o, _ in SHAPES[a][: 3 if a == "qwen2" else 1]),
}
SHARED = {"vblora": lambda c: c["num_vectors"] * c["vector_length"]}  # beside the layers
OPEN = ("shadow",)  # ShadowPEFT's network is a base of its own: as many weights as transformers gives it


def expected(name, architecture):
    arguments = config(name, architecture)["method"]["adapter"]
    if name in IN_ALL:
        return IN_ALL[name](architecture, arguments)
    layers = sum(PER_LAYER[name](i, o, b, arguments) for i, o, b in SHAPES[architecture])
    return L * layers + SHARED.get(name, lambda c: 0)(arguments)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("name", [name for name in NAMES if name not in OPEN])
def test_trains_as_many_weights_as_the_formula_says(name, architecture):
    model = attach(make(name, architecture), tiny_base(architecture))
    assert sum(p.numel() for p in trainable(model)) == expected(name, architecture)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_shapes_are_the_bases_own(architecture):
    block = blocks(tiny_base(architecture))[0]
    layers = [m for m in block.modules() if isinstance(m, nn.Linear)]
    assert [(m.in_features, m.out_features, m.bias is not None) for m in layers] == SHAPES[architecture]
    assert sum(p.numel() for p in block.parameters()) == BLOCK[architecture]
