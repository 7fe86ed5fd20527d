"""Recipes: YAML files that are checked whole, key by key, before anything is loaded.

A recipe is a dataclass (sections are dataclasses within it); the YAML gives values for its fields and nothing else.

    defaults: ../sft.yaml     # optional: start from that recipe (path relative to this file); one parent, any depth
    latent:
      weight: 0.5

Order, later wins: the dataclass' defaults, the parent's values, this file's, overrides `latent.weight=0.5`. So an
ablation is a few values over a base recipe. Lists and mappings with free keys: a list is replaced, a mapping is merged.
A field whose default is "???" must be given. `${section.key}` refers to another value.

Types are OmegaConf's: int, float, bool, str, `X | None`, list[X], dict[str, X], enums, nested dataclasses; no `Literal`
and no `tuple` (say `str` or `list` and check the value in `__post_init__`, by raising ConfigError).
"""

from __future__ import annotations

import dataclasses
import difflib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from future_l1_plugin.errors import ConfigError
from future_l1_plugin.journal import atomic_write

PARENT = "defaults"

T = TypeVar("T")


def load_recipe(path: str | os.PathLike, cls: type[T], overrides: Sequence[str] = ()) -> T:
    """Read a recipe into an instance of `cls`.

    Args:
        path: a YAML file.
        cls: a dataclass, possibly with dataclasses as fields.
        overrides: "a.b=c" strings, as they come from a command line; c is read as YAML.

    Raises:
        ConfigError: file (or parent) missing, not YAML, parents in a circle, unknown keys (all of one file at once,
            with the nearest and all valid ones), a value of the wrong type, a value that is required and not given, or
            what `cls.__post_init__` refuses. The message names the file (or override) and the key.
    """
    path = Path(path)
    recipe = OmegaConf.structured(cls)
    for file, values in _chain(path):
        recipe = merged(recipe, values, str(file))
    for override in overrides:
        key, equals, _ = override.partition("=")
        if not equals or not key.strip():
            raise ConfigError(f"override {override!r}: expected key=value, for example train.seed=1")
        try:
            values = OmegaConf.from_dotlist([override])
        except (yaml.YAMLError, OmegaConfBaseException) as error:
            raise ConfigError(f"override {override!r}: the value is not YAML ({_first_line(error)})") from error
        recipe = merged(recipe, values, f"override {override!r}")
    return _to_object(recipe, str(path), "Add to the file, or pass {}=VALUE on the command line.")


def from_mapping(cls: type[T], values: Mapping[str, Any], source: str) -> T:
    """Values that stand in a host's own configuration, into an instance of `cls`, checked as a recipe is.

    Args:
        cls: a dataclass, possibly with dataclasses as fields.
        values: a mapping (OmegaConf's or a plain one), resolved.
        source: what messages call it, such as the section's name.

    Raises:
        ConfigError: as `load_recipe`.
    """
    recipe = merged(OmegaConf.structured(cls), OmegaConf.create(OmegaConf.to_container(_config(values))), source)
    return _to_object(recipe, source, "Set it there.")


def _config(values: Mapping[str, Any]) -> DictConfig:
    return values if isinstance(values, DictConfig) else OmegaConf.create(dict(values))


def _to_object(recipe: DictConfig, source: str, fix: str) -> Any:
    """The checked dataclass; `fix` says how to give a missing key, with {} for its name."""
    try:
        if missing := sorted(OmegaConf.missing_keys(recipe)):
            raise ConfigError(f"{', '.join(missing)} must be given. {fix.format(missing[0])}")
        return OmegaConf.to_object(recipe)
    except ConfigError as error:
        # OmegaConf appends lines about its own nodes to what __post_init__ said.
        raise ConfigError(f"{source}: {_first_line(error)}") from error
    except OmegaConfBaseException as error:
        raise ConfigError(f"{source}: {_where(error)}{_first_line(error)}") from error


def save_recipe(obj: Any, path: str | os.PathLike) -> None:
    """Write a recipe, every value resolved, as YAML that `load_recipe` reads back to an equal object.

    Folders are created. The file appears under its name only when it is complete. Raises DataError: it cannot be
    written.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path, alone=False) as file:  # shards of a curation share it
        file.write(OmegaConf.to_yaml(OmegaConf.structured(obj), resolve=True).encode())


def _chain(path: Path) -> list[tuple[Path, DictConfig]]:
    """The file and its parents, the oldest first, each without its `defaults` key."""
    chain: list[tuple[Path, DictConfig]] = []
    visited: list[Path] = []
    asked_by = ""
    while True:
        if path.resolve() in visited:
            raise ConfigError(f"{path}: recipes name each other as `{PARENT}` in a circle. Break it.")
        visited.append(path.resolve())
        values = _read(path, asked_by)
        parent = values.pop(PARENT, None)
        chain.insert(0, (path, values))
        if parent is None:
            return chain
        if not isinstance(parent, str):
            raise ConfigError(
                f"{path}: `{PARENT}` is {parent!r}, expected the path of one recipe, relative to this file"
            )
        asked_by = f" (named as `{PARENT}` by {path})"
        path = path.parent / parent


def _read(path: Path, asked_by: str) -> DictConfig:
    if not path.is_file():
        near = sorted(path.parent.glob("*.yaml")) if path.parent.is_dir() else []
        there = f" There are: {', '.join(str(file) for file in near)}." if near else ""
        raise ConfigError(f"{path}: no such recipe{asked_by}.{there}")
    try:
        values = OmegaConf.load(path)
    except (yaml.YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not YAML ({' '.join(str(error).split())})") from error
    except OSError as error:  # raised by OmegaConf for a file with only a scalar
        raise ConfigError(f"{path}: expected keys and values ({error})") from error
    if not isinstance(values, DictConfig):
        raise ConfigError(f"{path}: holds a list, expected keys and values")
    return values


def merged(recipe: DictConfig, values: DictConfig, source: str) -> DictConfig:
    """`recipe` with `values` over it. Raises ConfigError: unknown keys, all at once, or wrong types."""
    problems = _problems(recipe, OmegaConf.to_container(values, resolve=False), "", _paths(recipe))
    if problems:
        raise ConfigError(f"{source}: " + "\n  ".join(problems))
    try:
        return OmegaConf.merge(recipe, values)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{source}: {_where(error)}{_first_line(error)}") from error


def _is_section(recipe: DictConfig, key: str) -> bool:
    return dataclasses.is_dataclass(OmegaConf.get_type(recipe, key))


def _paths(recipe: DictConfig, prefix: str = "") -> list[str]:
    """Every full key of the recipe, sections left out."""
    paths: list[str] = []
    for key in recipe:
        paths += _paths(recipe[key], f"{prefix}{key}.") if _is_section(recipe, key) else [f"{prefix}{key}"]
    return paths


def _problems(recipe: DictConfig, values: dict[Any, Any], prefix: str, paths: list[str]) -> list[str]:
    """Unknown keys, and values where a section belongs. OmegaConf would tell only the first, and no alternatives."""
    problems = []
    valid = list(recipe)
    for key, value in values.items():
        name = f"{prefix}{key}"
        if key not in valid:
            problems.append(f"unknown key `{name}`.{_nearest(str(key), name, prefix, valid, paths)}")
        elif _is_section(recipe, key):
            if isinstance(value, dict):
                problems += _problems(recipe[key], value, f"{name}.", paths)
            else:
                problems.append(f"`{name}` is a section with the keys {', '.join(recipe[key])}; found {value!r}")
    return problems


def _nearest(key: str, name: str, prefix: str, valid: list[str], paths: list[str]) -> str:
    # The same name elsewhere is a better guess than a similar name here; a similar full key is the last resort.
    guesses = (
        [path for path in paths if path.rpartition(".")[2] == key]
        or [prefix + near for near in difflib.get_close_matches(key, valid, n=1)]
        or difflib.get_close_matches(name, paths, n=1)
    )
    hint = f" Did you mean `{guesses[0]}`?" if guesses else ""
    return f"{hint} Valid keys{f' in `{prefix[:-1]}`' if prefix else ''}: {', '.join(valid)}."


def _where(error: OmegaConfBaseException) -> str:
    return f"`{error.full_key}`: " if error.full_key else ""


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]
