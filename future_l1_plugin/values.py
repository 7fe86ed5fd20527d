"""Values of settings, checked: of recipes, of command lines, of what a host passes on. Each raises ConfigError."""

import json
from collections.abc import Sequence
from typing import Any

from future_l1_plugin.errors import ConfigError


def one_of(name: str, value: str, allowed: Sequence[str]) -> str:
    """`value` if it is allowed."""
    if value not in allowed:
        raise ConfigError(f"{name}: expected one of {', '.join(allowed)}, found {value!r}")
    return value


def at_least(name: str, value: float, least: float) -> float:
    """`value` if it is a number of at least `least`; NaN is none."""
    if not value >= least:
        raise ConfigError(f"{name}: expected at least {least}, found {value!r}")
    return value


def whole(name: str, value: Any, least: int = 1) -> Any:
    """`value` as a whole number of at least `least`; None stays None."""
    if value is None:
        return None
    try:
        number = int(str(value))
    except ValueError:
        number = None
    if number is None or number < least:
        raise ConfigError(f"{name}: expected a whole number of at least {least}, found {value!r}")
    return number


def positive(name: str, value: Any) -> float | None:
    """`value` as a number above 0; None stays None."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
        raise ConfigError(f"{name}: expected a number above 0, found {value!r}")
    return float(value)


def flag(name: str, value: Any) -> bool | None:
    """`value` if it is True or False; None stays None."""
    if value is not None and not isinstance(value, bool):
        raise ConfigError(f"{name}: expected True or False, found {value!r}")
    return value


def json_object(name: str, value: str | dict[str, Any] | None) -> dict[str, Any]:
    """A JSON object from the command line; None and "" are empty."""
    if isinstance(value, dict) or not value:
        return value or {}
    try:
        parsed = json.loads(value)
    except json.JSONDecodeError as error:
        raise ConfigError(f'{name}: expected JSON such as {{"key": 1}}, found {value!r} ({error})') from error
    if not isinstance(parsed, dict):
        raise ConfigError(f"{name}: expected a JSON object, found {value!r}")
    return parsed
