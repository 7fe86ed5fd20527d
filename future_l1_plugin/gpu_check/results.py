"""Figures of the self-test, the rules they must hold to, verdicts, and the table for the README."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from future_l1_plugin.journal import atomic_write

PASSED, FAILED, SKIPPED = "passed", "failed", "skipped"


class Skip(Exception):
    """Raised by a part that cannot run here; the message says what is missing."""


@dataclass
class Figure:
    """One thing that was measured.

    value: a number, a word, or numbers by name (quantiles, batch sizes); None if it could not be measured here.
    rule: what it must hold to, in words; "" = only reported.
    ok: whether it does; None without a rule or a value.
    note: why the rule is what it is, or why there is no value.
    """

    name: str
    value: float | str | dict[str, float] | None
    unit: str = ""
    rule: str = ""
    ok: bool | None = None
    note: str = ""


@dataclass
class PartResult:
    """What a part leaves behind. `reason` says why it was skipped or failed."""

    title: str
    verdict: str = FAILED
    reason: str = "ended without a verdict"
    seconds: float = 0.0
    limit: float = 0.0
    figures: list[Figure] = field(default_factory=list)

    @classmethod
    def from_json(cls, found: dict[str, Any]) -> "PartResult":
        return cls(**{**found, "figures": [Figure(**figure) for figure in found["figures"]]})


class Recorder:
    """Takes a part's figures, prints each as it comes and keeps the file up to date, so that a kill loses nothing."""

    def __init__(self, title: str, path: Path) -> None:
        self.result, self._path = PartResult(title), path
        self.save()

    def save(self) -> None:
        with atomic_write(self._path) as file:
            file.write(json.dumps(asdict(self.result)).encode())

    def add(self, figure: Figure) -> None:
        self.result.figures.append(figure)
        print("  " + as_line(figure), flush=True)
        self.save()

    def number(
        self, name: str, value: Any, unit: str = "", most: float | dict[str, float] | None = None, note: str = ""
    ) -> None:
        """A number, or numbers by name. most: their limit, or limits by name. NaN never holds."""
        named = isinstance(value, dict)
        value = {k: float(v) for k, v in value.items()} if named else float(value)
        if isinstance(most, dict):
            rule = ", ".join(f"{key} at most {limit:g}" for key, limit in most.items())
            ok = all(value[key] <= limit for key, limit in most.items())
        else:
            rule = "" if most is None else f"at most {most:g}"
            ok = None if most is None else all(n <= most for n in (value.values() if named else [value]))
        self.add(Figure(name, value, unit, rule, ok, note))

    def spread(self, name: str, values: Any, unit: str, **most: float) -> None:
        """Quantiles of a tensor. most: limits by their names, e.g. median=0.1, max=1."""
        import torch

        values = values.detach().flatten().double().cpu()
        if not len(values):
            raise ValueError(f"{name}: expected values, found none")
        points = torch.tensor([0.5, 0.99], dtype=torch.float64)
        median, high = values.sort().values[((len(values) - 1) * points).round().long()].tolist()
        self.number(name, {"median": median, "99%": high, "max": float(values.max())}, unit, most or None)

    def check(self, name: str, ok: bool, found: str = "no") -> None:
        """Something that holds or does not. found: what to show if it does not."""
        self.add(Figure(name, "yes" if ok else found, "", "yes", bool(ok)))

    def skip(self, name: str, reason: str) -> None:
        """A figure that cannot be had here."""
        self.add(Figure(name, None, note=reason))


def as_line(figure: Figure) -> str:
    """For the terminal."""
    mark = {None: "  ", True: "ok", False: "NO"}[figure.ok]
    rule = f"   [{figure.rule}]" if figure.rule else ""
    return f"{mark}  {figure.name}: {shown(figure)}{rule}"


def shown(figure: Figure) -> str:
    """The value with its unit."""
    value = figure.value
    if value is None:
        return f"skipped: {figure.note}"
    if isinstance(value, dict):
        return f"{' / '.join(_short(v) for v in value.values())} {figure.unit} ({' / '.join(value)})".replace("  ", " ")
    return (value if isinstance(value, str) else f"{_short(value)} {figure.unit}").strip()


def _short(number: float) -> str:
    return f"{number:.0f}" if abs(number) >= 1000 else f"{number:.3g}"


def table(found: dict[str, Any]) -> str:
    """The Markdown table of a results file."""
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items() if version)
    lines = [
        f"{found['device']}, {found['date']}, commit {found['commit'][:10]}, {found['size']} size; {versions}.",
        "",
        "| part | figure | value | must be | holds |",
        "|---|---|---|---|---|",
    ]
    for letter, part in found["parts"].items():
        reason = f": {part['reason']}" if part["reason"] else ""
        verdict = f"**{part['verdict']}**{reason}"
        lines.append(f"| {letter} | **{part['title']}** | {part['seconds']:.0f} s | | {_cell(verdict)} |")
        for figure in (Figure(**figure) for figure in part["figures"]):
            holds = {None: "", True: "yes", False: "**no**"}[figure.ok]
            lines.append(f"| | {_cell(figure.name)} | {_cell(shown(figure))} | {_cell(figure.rule)} | {holds} |")
    return "\n".join(lines)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
