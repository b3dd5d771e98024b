"""Command line -> cells: Hydra composes every combination, and everything that is wrong with any is listed together."""

from __future__ import annotations

import os
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from finetune import confidential, runs
from finetune.config import differences, near, problems
from finetune.schema import Config

_packed = Path(__file__).parent / "conf"  # in a wheel
CONF = _packed if _packed.is_dir() else Path(__file__).parent.parent / "conf"


OUR_VARIABLES = ("FINETUNE_DATA", "FINETUNE_CACHE")  # all of the environment that a configuration may read


class Invalid(Exception):
    """What the person asked for cannot be composed; the message lists everything that is wrong."""


@dataclass(frozen=True)
class Cell:
    """One run to be: its resolved configuration and its folder."""

    config: Mapping[str, Any]
    folder: Path

    @property
    def name(self) -> str:
        """`task/model/method/seed`."""
        return "/".join(self.folder.parts[-4:])


def cells(args: Namespace, *, root: Path) -> list[Cell]:
    """The cells that the command line asks for, checked; raises `Invalid`."""
    only_our_resolvers()
    if root.exists() and not root.is_dir():
        raise Invalid(f"{root.absolute()} is no folder; runs are written into a folder of this name")
    if args.config_path or args.experimental_rerun or args.package:
        raise Invalid("--config-path, --experimental-rerun and --package mean nothing here; use --config-dir=FOLDER")
    with initialize_config_dir(str(CONF), version_base="1.3"):
        found: list[Cell] = []
        wrong: dict[str, None] = {}  # an ordered set
        for overrides in _combinations(args):
            cell = _cell(overrides, root, name=args.config_name or "config")
            if isinstance(cell, Cell):
                found.append(cell)
                wrong.update(dict.fromkeys(refusals(cell)))
            else:
                wrong.update(dict.fromkeys(cell))
    first: dict[Path, Cell] = {}
    for cell in found:
        other = first.setdefault(cell.folder, cell)
        # Also where only the folder of a data file differs: moved data are the same run, two files are two.
        if changed := differences(other.config, cell.config, moved=False):
            wrong[f"two cells want {cell.folder} ({'; '.join(changed)}); give them a study= each"] = None
    if wrong:
        raise Invalid("\n".join(wrong))
    return list({cell.folder: cell for cell in found}.values())


def only_our_resolvers() -> None:
    """Interpolations read no variable of the environment but ours: its values would be written into the run."""
    OmegaConf.register_new_resolver("oc.env", _variable, replace=True)


def _variable(name: str, default: str | None = None) -> str | None:
    if name not in OUR_VARIABLES:
        raise ValueError(f"${{oc.env:{name}}} is refused: only {' and '.join(OUR_VARIABLES)} can be read")
    value = os.environ.get(name, default)
    if value is None:
        raise ValueError(f"the environment variable {name} is not set")
    return value


def _combinations(args: Namespace) -> list[list[str]]:
    """The overrides of every cell: the command line's over those of the experiment's sweep."""
    given = [*args.overrides]
    if args.config_dir:
        if not Path(args.config_dir).is_dir():
            raise Invalid(f"--config-dir={args.config_dir}: there is no such folder")
        given.append(f"hydra.searchpath=[file://{Path(args.config_dir).resolve()}]")
    try:
        parser = OverridesParser.create(config_loader=GlobalHydra.instance().config_loader())
        parsed = parser.parse_overrides(given)
        fixed = [o.input_line for o in parsed if o.input_line and not o.is_sweep_override()]
        top = compose(args.config_name or "config", overrides=fixed, return_hydra_config=True).hydra
    except (HydraException, OmegaConfBaseException, ValueError) as error:  # Hydra's own of an empty key
        raise Invalid(_explain(error)) from None
    params: list[Any] = []
    if args.multirun or top.mode == RunMode.MULTIRUN:
        params = parser.parse_overrides([f"{key}={value}" for key, value in (top.sweeper.params or {}).items()])
    elif several := [o.input_line for o in parsed if o.is_sweep_override()]:
        raise Invalid(f"{' '.join(map(str, several))}: several values make a grid; add -m")
    try:  # also of a single cell, whose folder must not depend on -m
        return BasicSweeper.split_arguments([*params, *parsed], None)[0]
    except HydraException as error:
        raise Invalid(_explain(error)) from None


def _cell(overrides: Sequence[str], root: Path, *, name: str) -> Cell | list[str]:
    """Compose one cell; what is wrong with it, when it is no run."""
    try:
        config = compose(name, overrides=list(overrides), return_hydra_config=True)
        task_overrides = [str(o) for o in config.hydra.overrides.task]
        chosen = {group: str(config.hydra.runtime.choices[group]) for group in ("model", "method", "task")}
        with open_dict(config):
            del config.hydra
        resolved = _resolve(config)
    except (HydraException, OmegaConfBaseException) as error:
        return [_explain(error)]
    given = dict(override.partition("=")[::2] for override in task_overrides)
    wrong = (
        confidential.found(given) or confidential.found(resolved) or problems(resolved) or _misnamed(resolved, chosen)
    )
    return wrong or Cell(config=resolved, folder=runs.folder(root, resolved, task_overrides))


def _misnamed(config: Mapping[str, Any], chosen: Mapping[str, str]) -> list[str]:
    """Files whose `name`, which the run's folder bears, is another's."""
    return [
        f"{group}/{stem}.yaml has name: {config[group]['name']}; it must be {stem}, as the file"
        for group, stem in chosen.items()
        if config[group]["name"] != stem
    ]


def _resolve(config: DictConfig) -> dict[str, Any]:
    resolved = OmegaConf.to_container(config, resolve=True)
    assert isinstance(resolved, dict)
    return {str(key): value for key, value in resolved.items()}


def refusals(cell: Cell) -> list[str]:
    """Why the cell's folder is not this cell's: another configuration made it."""
    if not (cell.folder / "config.yaml").exists():
        return []
    try:
        old = runs.read_config(cell.folder)
        changed = differences(old, cell.config)
    except (ValueError, OSError, TypeError, RecursionError) as error:  # YAML holds dates, and itself
        return [f"{cell.folder}/config.yaml cannot be read ({error}); remove the folder"]
    if not changed:
        return []
    why = "; ".join(changed)
    return [f"{cell.folder} was made by another configuration ({why}); choose another study=, or remove the folder"]


def _explain(error: Exception) -> str:
    """What Hydra found wrong, in a line, with the near miss spelled out."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if isinstance(error, MissingConfigException) and error.missing_cfg_file and error.options:
        group, _, choice = error.missing_cfg_file.rpartition("/")
        known = ", ".join(error.options)
        return f"{group}={choice}: there is no such file{near(choice, error.options)} (there are {known})"
    if isinstance(error, OverrideParseException):
        return f"{error.override}: is no key=value; a value with commas has no spaces, or quotation marks around it"
    if lines and lines[0].startswith("Could not override '"):
        key = lines[0].split("'")[1]
        return f"{key}: no such key{_elsewhere(key) or near(key.rpartition('.')[2], _keys(key))}"
    if error.__cause__ is not None:
        lines += [line for line in str(error.__cause__).splitlines()[:1] if line not in lines]
    return "; ".join(lines)


def _elsewhere(key: str) -> str:
    """Keys of this name at other places of the default configuration."""
    name = key.rpartition(".")[2]
    found = [path for path in _paths(_resolve(compose("config"))) if path.rpartition(".")[2] == name]
    return f"; did you mean {' or '.join(found)}?" if found else ""


def _paths(section: Mapping[str, Any]) -> Iterator[str]:
    """Dotted keys."""
    for key, value in section.items():
        yield key
        if isinstance(value, Mapping):
            yield from (f"{key}.{path}" for path in _paths(value))


def _keys(key: str) -> list[str]:
    """The names that the schema knows beside a key."""
    section: Any = Config
    for part in key.split(".")[:-1]:
        section = section.model_fields[part].annotation if part in section.model_fields else None
        if not hasattr(section, "model_fields"):
            return []
    return list(section.model_fields)
