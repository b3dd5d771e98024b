"""A method file's `adapter` section becomes a `Method`."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import traceback
import typing
from collections.abc import Mapping
from typing import Any

from peft import PeftConfig

from finetune.methods.method import Method
from finetune.methods.peft import Peft


def build(config: Mapping[str, Any]) -> Method:
    """The method that `config` (the `method` section) describes; raises ValueError for arguments that do not fit."""
    arguments = {key: value for key, value in config["adapter"].items() if key != "_target_"}
    found = _class(config["adapter"]["_target_"])
    if dataclasses.is_dataclass(found):
        _refuse_words(config["name"], found, arguments)
    try:
        adapter = found(**arguments)
    except Exception as error:  # whatever a library's own checks raise
        raise ValueError(f"method.adapter of {config['name']}: {type(error).__name__}: {error}") from error
    return adapter if isinstance(adapter, Method) else Peft(adapter)


def _refuse_words(name: str, kind: type, arguments: Mapping[str, Any]) -> None:
    """Raise ValueError for a word where a number is wanted, which PEFT would take until it computes with it."""
    wanted = typing.get_type_hints(kind)
    for key, value in arguments.items():
        if isinstance(value, str) and wanted.get(key) in (int, float, bool):
            raise ValueError(f"method.adapter.{key}={value}: {name} wants {wanted[key].__name__}")


def _class(target: str) -> type[Method] | type[PeftConfig]:
    """A config class of PEFT or a `Method` of this package: nothing else is called, whatever a configuration says."""
    module, _, name = str(target).rpartition(".")
    ours = module.startswith("finetune.methods.") and module.count(".") == 2
    if module == "peft" or ours:
        found = getattr(_module(module), name, None)
        if inspect.isclass(found) and issubclass(found, (Method, PeftConfig)):
            return found
    raise ValueError(f"method.adapter._target_={target} is neither a config of PEFT nor a method of this package")


def _module(name: str) -> Any:
    """The module, None if there is none; raises ValueError for one that cannot be imported."""
    try:
        return importlib.import_module(name)
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and error.name == name:
            return None
        last = traceback.extract_tb(error.__traceback__)[-1]
        place = (error.filename, error.lineno) if isinstance(error, SyntaxError) else (last.filename, last.lineno)
        raise ValueError(f"{place[0]}:{place[1]}: {type(error).__name__}: {error}") from error
