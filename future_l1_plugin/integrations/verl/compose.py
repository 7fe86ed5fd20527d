"""The configuration that a recipe and overrides make for verl, as `verl.trainer.main_ppo` would have it."""

import contextlib
import io
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from future_l1_plugin.errors import ConfigError


def compose(recipe: Path, overrides: list[str]) -> DictConfig:
    """The configuration that `main_ppo --config-dir .. --config-name ..` would have, resolved.

    Raises ConfigError: no such recipe, one of another host, a wrong override, or a value that must be given.
    """
    import yaml
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    if not recipe.is_file():
        raise ConfigError(f"{recipe}: no such recipe")
    own = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    if not isinstance(own, dict) or not isinstance(own.get("defaults"), list):
        raise ConfigError(
            f"{recipe}: expected a recipe of verl, such as recipes/la_dapo.yaml. SFT: scripts/sft.sh RECIPE --dry-run"
        )
    try:
        with initialize_config_dir(str(recipe.resolve().parent), version_base=None):
            search = "hydra.searchpath=[pkg://verl.trainer.config]"  # where main_ppo looks by itself
            config = hydra_compose(recipe.stem, overrides=[search, *overrides])
        # Read from the files: a "???" over a value of verl's own is no value, and Hydra keeps verl's.
        if missing := [key for key, value in _named(recipe, overrides).items() if value == "???"]:
            raise ConfigError(f"{recipe}: must be given: " + ", ".join(f"{key}=VALUE" for key in missing))
        OmegaConf.resolve(config)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(f"{recipe}: {str(error).strip().splitlines()[0]}") from error
    return config


def ask_verl(config: DictConfig) -> None:
    """verl's own checks. Raises ConfigError."""
    from verl.trainer.ppo.utils import need_critic, need_reference_policy
    from verl.utils.config import validate_config

    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():  # it prints that all is well
            warnings.simplefilter("ignore")
            validate_config(config, need_reference_policy(config), need_critic(config))
    except (AssertionError, ValueError, TypeError) as error:
        raise ConfigError(f"verl refuses the configuration: {error}") from error


def given_values(config: DictConfig, recipe: Path, overrides: list[str]) -> list[str]:
    """The keys that recipes and overrides name, with the values that hold."""
    shown = OmegaConf.create({})
    for name in _named(recipe, overrides):
        if OmegaConf.select(config, name, default=None) is not None:
            OmegaConf.update(shown, name, OmegaConf.select(config, name))
    return OmegaConf.to_yaml(shown).rstrip().splitlines()


def _named(recipe: Path, overrides: list[str]) -> dict[str, Any]:
    """The keys that recipes and overrides name, and what they say; later ones win."""
    import yaml

    values, named = yaml.safe_load(recipe.read_text(encoding="utf-8")) or {}, {}
    for parent in values.pop("defaults", []):
        file = recipe.parent / f"{parent}.yaml"
        if isinstance(parent, str) and file.is_file():
            named |= _named(file, [])
    named |= dict(_leaves(values))
    for override in overrides:
        key, _, value = override.lstrip("+~").partition("=")
        file = recipe.parent / key / f"{value}.yaml"
        named |= _named(file, []) if file.is_file() else {key: value}
    return named


def _leaves(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value
