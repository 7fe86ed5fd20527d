"""Whether a run may go on under settings that differ from those it was started with: `table` applied. No torch."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from future_l1_plugin.errors import ConfigError
from future_l1_plugin.resume.table import Kind, Rule, rule_of

_SHOWN = 5
_UNSET = "(not set)"


@dataclass
class Changes:
    """What differs, as lines that name key, old and new value.

    Attributes:
        refused: changes of results, and of limits in the wrong direction, with the reason.
        extended: more of the same.
        said: changes of cost after which a result may move a little.
    """

    refused: list[str] = field(default_factory=list)
    extended: list[str] = field(default_factory=list)
    said: list[str] = field(default_factory=list)


def flat(values: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings as dotted keys. Lists of mappings are numbered; other lists and empty mappings are values."""
    found: dict[str, Any] = {}
    values = list(values) if isinstance(values, tuple) else values  # as it comes back from a file
    if isinstance(values, list) and values and all(isinstance(item, Mapping) for item in values):
        values = dict(enumerate(values))
    if isinstance(values, Mapping) and values:
        for key, value in values.items():
            found |= flat(value, f"{prefix}.{key}" if prefix else str(key))
    else:
        found[prefix] = values
    return found


def changes(host: str, before: Mapping[str, Any], after: Mapping[str, Any]) -> Changes:
    """Compare two flat configurations (`flat`) of `sft`, `verl` or `easyr1`.

    A section that is missing in `before` was not kept by the version that wrote it, and is not compared.
    """
    kept = {key.split(".")[0] for key in before}
    found = Changes()
    for key in sorted({*before, *after}):
        old, new = before.get(key), after.get(key)
        if key.split(".")[0] not in kept or _equal(old, new):
            continue
        rule = rule_of(host, key)
        if rule.same is not None and _equal(rule.same(old), rule.same(new)):
            continue
        line = f"{key}: {_shown(key, before)} -> {_shown(key, after)}"
        if rule.kind is Kind.RESULTS:
            found.refused.append(f"{line} ({rule.said})" if rule.said else line)
        elif rule.kind is Kind.COST:
            found.said += [f"{line} ({rule.said})"] if rule.said else []
        elif rule.both or _wider(rule, old, new):
            found.extended.append(f"{line} ({rule.said or rule.why})")
        else:
            found.refused.append(f"{line} (it may be raised, not lowered)")
    return found


def check(host: str, before: Mapping[str, Any], after: Mapping[str, Any], holds: str, way_out: str) -> list[str]:
    """Lines that a run which goes on prints about its changes.

    Args:
        holds: opens the message, as "FOLDER holds a run".
        way_out: what else can be done, as a sentence.

    Raises:
        ConfigError: a change that is refused; names the first five.
    """
    found = changes(host, before, after)
    if found.refused:
        more = f" and {len(found.refused) - _SHOWN} more" if len(found.refused) > _SHOWN else ""
        raise ConfigError(
            f"{holds} with other settings ({'; '.join(found.refused[:_SHOWN])}{more}). Set them back, to go on with "
            f"it (recipes/resume.md says which keys may change). {way_out}"
        )
    lines = [f"going on with more: {line}" for line in found.extended]
    return lines + [f"going on otherwise: {line}" for line in found.said]


def _shown(key: str, values: Mapping[str, Any]) -> str:
    return str(values[key]) if key in values else _UNSET


def _equal(old: Any, new: Any) -> bool:
    if isinstance(old, bool) or isinstance(new, bool):
        return str(old) == str(new)
    a, b = _number(old), _number(new)
    return old == new or str(old) == str(new) or (a is not None and a == b)


def _wider(rule: Rule, old: Any, new: Any) -> bool:
    if rule.order:
        return old in rule.order and new in rule.order and rule.order.index(old) < rule.order.index(new)
    a, b = _number(old), _number(new)
    return a is not None and b is not None and 0 <= a < b  # -1 and null are no lengths: nobody can tell which is longer


def _number(value: Any) -> float | None:
    try:
        return float(value)
    except (TypeError, ValueError):
        return None
