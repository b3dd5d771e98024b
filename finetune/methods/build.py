"""A method file's `adapter` section becomes a `Method`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hydra.errors import InstantiationException
from hydra.utils import instantiate

from finetune.methods.method import Method
from finetune.methods.peft import Peft


def build(config: Mapping[str, Any]) -> Method:
    """The method that `config` (the `method` section) describes; raises ValueError for arguments that do not fit."""
    try:
        # Not recursive: a `_target_` further down is not checked against the allowed ones and must stay data.
        adapter = instantiate(dict(config["adapter"]), _convert_="object", _recursive_=False)
    except InstantiationException as error:
        raise ValueError(f"method.adapter of {config['name']}: {error.__cause__ or error}") from None
    return adapter if isinstance(adapter, Method) else Peft(adapter)
