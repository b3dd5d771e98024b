"""Small bases made on the spot, for every test that needs one."""

import gc
import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "offline"

import pytest

pytest_plugins = ["report_runs", "grids", "vllm_standin"]  # folders written by hand; real commands; in place of vLLM


def tiny_base(architecture: str, *, seed: int = 0, vocab_size: int = 96):
    """A random two-layer base of a real transformers class, float32, end token 2."""
    import torch
    import transformers

    shape = {"vocab_size": vocab_size, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    wide = {"num_key_value_heads": 2, "intermediate_size": 64, "max_position_embeddings": 256, "head_dim": 8}
    ends = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    config = {
        "qwen2": lambda: transformers.Qwen2Config(**shape, **wide, **ends),
        "llama": lambda: transformers.LlamaConfig(**shape, **wide, **ends),
        "glm": lambda: transformers.GlmConfig(**shape, **wide, **ends),
        "bloom": lambda: transformers.BloomConfig(vocab_size=vocab_size, hidden_size=32, n_layer=2, n_head=4, **ends),
    }[architecture]()
    torch.manual_seed(seed)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


ARCHITECTURES = ("qwen2", "llama", "glm", "bloom")
PACKED = ("qwen2", "llama", "glm")


@pytest.fixture
def examples():
    """Twelve rows of random tokens, of very different lengths."""
    import random
    from types import SimpleNamespace

    draw = random.Random(0)
    found = []
    for length in (5, 40, 9, 23, 3, 17, 31, 8, 12, 28, 6, 19):
        ids = [draw.randrange(3, 96) for _ in range(length)]
        found.append(SimpleNamespace(ids=ids, num_prompt=max(1, length // 2)))
    return found


def pytest_collection_modifyitems(items):
    """Whole grids first: a file is one worker's, and the longest must not be the last."""
    long = ("test_main.py", "test_experiment.py", "test_notebooks.py", "test_miniature.py")
    items.sort(key=lambda item: item.path.name not in long)


def pytest_collection_finish():
    """Libraries stay: the collections that a training ends with need not look through them each time."""
    gc.collect()
    gc.freeze()
