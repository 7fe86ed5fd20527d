"""The rewards of a recipe: a weighted sum of terms, computed in two steps.

    rewards:
      - {term: accuracy, weight: 0.9}
      - {term: format, weight: 0.1}
      - {term: r_ctr, weight: 0.2, temperature: 0.5}
      - {import_path: "pkg.mod:name", weight: 0.3, limit: 1}       # a function of one's own

`score_sample` runs where one response is known (a host's reward workers), `score_group` where all responses to a prompt
are. Between the two only names and numbers travel. Whether a rollout is correct follows from the entry that is named
`accuracy`: at least 0.5. An answer that no rule and no judge decided has accuracy 0 and so counts as wrong.

An exception that a term raises (a judge that cannot be reached, say) passes through as it is.
"""

from __future__ import annotations

import inspect
import math
import numbers
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from future_l1_plugin.errors import ConfigError, RewardError, UserError
from future_l1_plugin.rewards.registry import Sample, Term, find_term, import_term

ACCURACY = "accuracy"
CORRECT_FROM = 0.5
_PREFIX = "reward"


@dataclass(frozen=True)
class Entry:
    """One line of a recipe's `rewards`."""

    name: str
    term: Term
    weight: float
    keywords: Mapping[str, Any]


class RewardSet:
    """The terms of a recipe with their weights and keywords; made by `from_config`."""

    def __init__(self, entries: Sequence[Entry]) -> None:
        self.entries = tuple(entries)

    @classmethod
    def from_config(cls, config: Sequence[Mapping[str, Any]]) -> RewardSet:
        """Check a recipe's `rewards` as a whole and make the set.

        An entry has `term` (a registered name) or `import_path` ("pkg.mod:name"), `weight` (a finite number; 0 reports
        a term without rewarding it), `name` (by default the term's; needed to use one term twice), and keywords of the
        term.

        Raises:
            ConfigError: all problems at once, each with the entry's number (from 1): an unknown term (with the nearest
                and all valid ones), neither or both of `term` and `import_path`, a bad weight, an unknown, missing or
                mistyped keyword, a value that the term refuses, a name used twice, or a term that needs the accuracy
                where none is listed.
        """
        if isinstance(config, str | Mapping) or not isinstance(config, Sequence):
            raise ConfigError(f"rewards: expected a list of entries such as {_EXAMPLE}, found {config!r}")
        if not config:
            raise ConfigError(f"rewards: the list is empty. Add at least one entry, such as {_EXAMPLE}")
        entries: list[Entry] = []
        problems: list[str] = []
        for number, row in enumerate(config, start=1):
            try:
                entries.append(_entry(row))
            except UserError as error:
                problems.append(f"entry {number}: {error}")
        names = [entry.name for entry in entries]
        for name in sorted({name for name in names if names.count(name) > 1}):
            problems.append(f"{names.count(name)} entries are named `{name}`. Give all but one another `name:`.")
        for entry in entries:
            if entry.term.needs_accuracy and ACCURACY not in names and not problems:
                problems.append(
                    f"`{entry.name}` needs to know which rollouts are correct, and no entry is named `{ACCURACY}`. "
                    f"Add {{term: {ACCURACY}, weight: 0}}, with the weight you want."
                )
        if accuracy := [e for e in entries if e.name == ACCURACY and e.term.scope != "sample"]:
            problems.append(f"`{ACCURACY}` is the group term {accuracy[0].term.name}, expected a per-sample term.")
        if problems:
            raise ConfigError("rewards: " + "\n  ".join(problems))
        return cls(entries)

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the entries, in the order of the recipe."""
        return tuple(entry.name for entry in self.entries)

    @property
    def sample_names(self) -> tuple[str, ...]:
        """The names of the entries that `score_sample` computes."""
        return tuple(entry.name for entry in self.entries if entry.term.scope == "sample")

    @property
    def reads_text(self) -> bool:
        """Whether `accuracy` can decide text in other words than the ground truth's: by a judge, or as `exact_text`
        and a function of the user's own say."""
        entry = next((entry for entry in self.entries if entry.name == ACCURACY), None)
        if entry is None or entry.term.function is not find_term(ACCURACY).function:
            return True
        return "judge" in entry.keywords or bool(entry.keywords.get("exact_text"))

    @property
    def weights(self) -> dict[str, float]:
        """Name -> weight."""
        return {entry.name: entry.weight for entry in self.entries}

    async def score_sample(self, sample: Sample) -> dict[str, float]:
        """The per-sample terms of one response: name -> value, before weighting.

        Raises RewardError if a term gives no finite number; whatever a term raises passes through.
        """
        scores = {}
        for entry in self.entries:
            if entry.term.scope == "sample":
                value = entry.term.function(sample, **entry.keywords)
                if inspect.isawaitable(value):
                    value = await value
                scores[entry.name] = _number(value, entry.name, sample)
        return scores

    def score_group(
        self, samples: Sequence[Sample], sample_scores: Sequence[Mapping[str, float]]
    ) -> tuple[list[float], dict[str, list[float]]]:
        """The total rewards of all responses to one prompt.

        Args:
            samples: G responses.
            sample_scores: what `score_sample` gave for each, in the same order.

        Returns:
            G totals (the weighted sums), and name -> G values before weighting, in the order of the recipe.

        Raises:
            RewardError: scores that do not belong to these samples and this recipe, or a group term that gives
                anything but one finite number for each sample; whatever a term raises passes through.
        """
        if len(samples) != len(sample_scores):
            raise RewardError(
                f"expected the scores of {len(samples)} samples, found {len(sample_scores)}. "
                "Pass what score_sample gave for each."
            )
        for sample, scores in zip(samples, sample_scores, strict=True):
            if set(scores) != set(self.sample_names):
                raise RewardError(
                    f"sample {sample.sample_id!r}: expected scores named {', '.join(self.sample_names) or '(none)'}, "
                    f"found {', '.join(scores) or '(none)'}. Score samples and groups by one recipe."
                )
        if ACCURACY in self.sample_names:
            samples = [
                replace(sample, correct=bool(_number(scores[ACCURACY], ACCURACY, sample) >= CORRECT_FROM))
                for sample, scores in zip(samples, sample_scores, strict=True)
            ]
        terms = {}
        for entry in self.entries:
            if entry.term.scope == "sample":
                values = [scores[entry.name] for scores in sample_scores]
            else:
                values = _values(entry.term.function(list(samples), **entry.keywords), entry.name, samples)
            terms[entry.name] = [_number(v, entry.name, s) for v, s in zip(values, samples, strict=True)]
        totals = [math.fsum(entry.weight * terms[entry.name][i] for entry in self.entries) for i in range(len(samples))]
        return totals, terms

    def metrics(
        self, samples: Sequence[Sample], totals: Sequence[float], terms: Mapping[str, Sequence[float]]
    ) -> dict[str, float]:
        """Means over samples, of any number of groups: "reward", "reward/ENTRY", "reward/ENTRY/METRIC" of a term's own.

        What no sample has a value for (the cosine of adjacent spans where no rollout has two) is left out.

        Args:
            samples: N responses.
            totals, terms: what `score_group` gave for them, before weighting.
        """
        columns: dict[str, list[float]] = {_PREFIX: list(totals)}
        for entry in self.entries:
            columns[f"{_PREFIX}/{entry.name}"] = list(terms[entry.name])
            for name, function in entry.term.metrics.items():
                found = [function(sample) for sample in samples]
                columns[f"{_PREFIX}/{entry.name}/{name}"] = [value for value in found if value is not None]
        return {name: math.fsum(column) / len(column) for name, column in columns.items() if column}


_EXAMPLE = "{term: accuracy, weight: 0.9}"


def _entry(row: Any) -> Entry:
    if not isinstance(row, Mapping):
        raise ConfigError(f"expected keys and values such as {_EXAMPLE}, found {row!r}")
    keywords = dict(row)
    name, weight = keywords.pop("name", None), keywords.pop("weight", None)
    term_name, path = keywords.pop("term", None), keywords.pop("import_path", None)
    if (term_name is None) == (path is None):
        raise ConfigError(f"expected one of `term` and `import_path`, found {dict(row)!r}")
    term = import_term(str(path)) if term_name is None else find_term(str(term_name))
    name = term.name if name is None else str(name)
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight):
        raise ConfigError(f"`{name}`: `weight` is {weight!r}, expected a finite number (YAML reads 1e-1 as text: 0.1)")
    if problems := term.problems(keywords):
        raise ConfigError(f"`{name}`: " + " ".join(problems))
    if term.prepare is not None:
        try:
            keywords = dict(term.prepare(**keywords))
        except UserError as error:
            raise ConfigError(f"`{name}`: {error}") from error
    return Entry(name, term, float(weight), keywords)


def _number(value: Any, name: str, sample: Sample) -> float:
    number = value.tolist() if hasattr(value, "tolist") else value  # a tensor or an array of no dimension
    if not isinstance(number, numbers.Real) or not math.isfinite(number):
        raise RewardError(
            f"reward term {name!r}, sample {sample.sample_id!r}: expected a finite number, found {value!r}. "
            "Fix the term, or take it out of `rewards`."
        )
    return float(number)


def _values(values: Any, name: str, samples: Sequence[Sample]) -> list[Any]:
    values = values.tolist() if hasattr(values, "tolist") else values
    if not isinstance(values, list | tuple) or len(values) != len(samples):
        length = f" of length {len(values)}" if isinstance(values, list | tuple) else f" ({values!r})"
        names = ", ".join(repr(sample.sample_id) for sample in samples)
        raise RewardError(
            f"reward term {name!r}, group of the samples {names}: expected a list of {len(samples)} numbers, one for "
            f"each sample, found {type(values).__name__}{length}. Fix the term, or take it out of `rewards`."
        )
    return list(values)
