"""Canaries in the environment and in overrides: they are in no file of the tree."""

import pytest
from grids import folders

SECRETS = {
    "WANDB_API_KEY": "0123456789abcdef0123456789abcdef01234567",
    "HF_TOKEN": "hf_canaryCanaryCanaryCanaryCanary",
    "MY_SECRET": "canary-of-the-secret",
    "DB_PASSWORD": "canary-of-the-password",
}


def holding(folder):
    """Files that hold a canary."""
    values = [value.encode() for value in SECRETS.values()]
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert files
    return [path for path in files if any(value in path.read_bytes() for value in values)]


@pytest.mark.faults
def test_no_secret_reaches_the_tree(command, tmp_path):
    result = command("method=lora", "wandb.mode=offline", **SECRETS)
    assert result.returncode == 0, result.stderr
    assert list(tmp_path.rglob("*.wandb"))
    assert holding(tmp_path) == []
    assert not any(value in result.stderr + result.stdout for value in SECRETS.values())


@pytest.mark.faults
@pytest.mark.parametrize(
    "word",
    [
        f"study=x{SECRETS['MY_SECRET']}",
        f"+optim.optimizer.name={SECRETS['HF_TOKEN']}",
        f"model.path=https://user:{SECRETS['DB_PASSWORD']}@host/base",
        f"no_such_key={SECRETS['MY_SECRET']}",
        "data_dir=${oc.env:DB_PASSWORD}",
        "+wandb.api_key=whatever",
    ],
    ids=["study", "argument", "address", "unknown-key", "interpolation", "key"],
)
def test_an_override_with_a_secret_is_refused_and_not_repeated(command, tmp_path, word):
    result = command(word, **SECRETS)
    assert result.returncode == 2
    assert not any(value in result.stderr + result.stdout for value in SECRETS.values())
    assert folders(tmp_path) == []
