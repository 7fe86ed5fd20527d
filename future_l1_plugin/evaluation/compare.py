"""Two runs of futurebench on the same questions: what one got right that the other did not.

    future-l1 compare A B          # two folders given to lmms-eval as --output_path, with --log_samples

A difference means something only if both were asked the same: the same questions and videos, as many frames of as many
pixels, the same prompt. Where these differ `compare` refuses, unless told `--anyway`. Decoding settings and versions
may differ, and are shown.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from future_l1_plugin.errors import DataError
from future_l1_plugin.evaluation.results import read_samples, results_file
from future_l1_plugin.evaluation.statistics import Paired, clustered_stderr
from future_l1_plugin.latent.tokens import LATENT, START

TASK = "futurebench"


@dataclass(frozen=True)
class Sample:
    """One answered futurebench question: right or not, its text, latent spans opened and latents in them.

    prediction: the letter read from the text, None = no answer. tokens: of the response, latents among them. seconds:
    its share of its batch's time. `from_row` leaves None what a log of an earlier version lacks.
    """

    doc_id: int
    question_type: str
    correct: bool
    text: str
    id: str = ""
    video: str = ""
    prediction: str | None = None
    tokens: int | None = None
    seconds: float | None = None

    @classmethod
    def from_row(cls, row: dict[str, Any]) -> "Sample":
        """From a logged sample, as `read_samples` returns it or as lmms-eval's evaluator does."""
        answer = row["future_acc"]
        counts = (row.get("token_counts") or [None])[0] or {}
        return cls(
            doc_id=row["doc_id"],
            question_type=answer["question_type"],
            correct=bool(answer["score"]),
            text=_first(row["filtered_resps"]),
            id=answer.get("id", str(row["doc_id"])),
            video=answer.get("video", ""),
            prediction=answer.get("prediction"),
            tokens=counts.get("output_tokens"),
            seconds=counts.get("seconds"),
        )

    @property
    def spans(self) -> int:
        return self.text.count(START)

    @property
    def latents(self) -> int:
        return self.text.count(LATENT)


def _first(value: Any) -> str:
    while isinstance(value, list):
        value = value[0]
    return str(value)


def paired(ours: Sequence[Sample], theirs: Sequence[Sample]) -> Paired:
    """Both hold the same doc_ids, in any order. Errors are clustered by video (`clustered_stderr`)."""
    other = {sample.doc_id: sample.correct for sample in theirs}
    differences = [sample.correct - other[sample.doc_id] for sample in ours]
    return Paired(
        n=len(differences),
        difference=sum(differences) / len(differences),
        stderr=clustered_stderr(differences, [sample.video or str(sample.doc_id) for sample in ours]),
        gained=differences.count(1),
        lost=differences.count(-1),
    )


# ---- two folders ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Comparison:
    """b minus a. flips: the pairs (of a, of b) of which exactly one is right. notes: settings in which they differ."""

    all: Paired
    by_type: dict[str, Paired]
    flips: list[tuple[Sample, Sample]]
    notes: list[str]


def compare(a: str | Path, b: str | Path, anyway: bool = False) -> Comparison:
    """Compare the newest runs below two output folders.

    Args:
        anyway: compare runs that were not asked the same; their common questions are compared then, and notes say so.

    Raises:
        DataError: a run did not finish or logged no samples; questions, frames, pixels or prompts differ, or a run of
            an earlier version does not say what they were.
    """
    (rows_a, told_a), (rows_b, told_b) = ((read_samples(folder), _told(folder)) for folder in (a, b))
    hindrances = _questions(rows_a, rows_b) + _differences(told_a, told_b, ("data", "frames", "pixels", "prompt"))
    if hindrances and not anyway:
        listed = "".join(f"\n  {line}" for line in hindrances)
        raise DataError(
            f"{a} and {b} were not asked the same, so a difference would say little:{listed}\nRun one of them again as "
            "the other was, or add --anyway."
        )
    common = {row["doc_id"] for row in rows_a} & {row["doc_id"] for row in rows_b}
    if not common:
        raise DataError(f"{a} and {b} have no question in common")
    ours, theirs = ([Sample.from_row(row) for row in rows if row["doc_id"] in common] for rows in (rows_b, rows_a))
    types = sorted({sample.question_type for sample in ours})
    kinds = {kind: [[s for s in run if s.question_type == kind] for run in (ours, theirs)] for kind in types}
    return Comparison(
        all=paired(ours, theirs),
        by_type={kind: paired(*runs) for kind, runs in kinds.items()},
        flips=[(x, y) for x, y in zip(theirs, ours, strict=True) if x.correct != y.correct],
        notes=[f"NOT COMPARABLE: {line}" for line in hindrances]
        + _differences(told_a, told_b, ("decoding", "generation", "versions")),
    )


def _told(folder: str | Path) -> dict[str, Any]:
    """What a run's results.json says of its data, model and settings; None where it says nothing."""
    config = json.loads(results_file(folder).read_text(encoding="utf-8"))["configs"].get(TASK, {})
    told = (config.get("metadata") or {}).get("future_l1") or {}
    model = told.get("model") or {}
    return {
        "data": (told.get("data") or {}).get("hash"),
        **{name: model.get(name) for name in ("frames", "pixels", "prompt", "decoding")},
        "generation": config.get("generation_kwargs"),
        "versions": told.get("versions"),
    }


def _differences(a: dict[str, Any], b: dict[str, Any], names: Sequence[str]) -> list[str]:
    # Missing values do not count as equal: two runs that say nothing of their frames may have seen different ones.
    return [
        f"{name}: {_shown(a[name])} and {_shown(b[name])}" for name in names if a[name] != b[name] or a[name] is None
    ]


def _shown(value: Any) -> str:
    return "not said" if value is None else json.dumps(value)


def _questions(a: list[dict[str, Any]], b: list[dict[str, Any]]) -> list[str]:
    """In which ways the questions of two runs differ."""
    asked_a, asked_b = ({row["doc_id"]: row for row in rows} for rows in (a, b))
    if asked_a.keys() != asked_b.keys():
        return [f"questions: {len(a)} and {len(b)}, {len(asked_a.keys() & asked_b.keys())} of them in both"]
    return [
        f"{what}: {len(other)} questions differ, the first is number {other[0]}"
        for what, key in (("items", "doc_hash"), ("prompts", "input"))
        if (other := [i for i in asked_a if asked_a[i].get(key) != asked_b[i].get(key)])
    ]


def show(found: Comparison) -> None:
    """Print a comparison."""
    for note in found.notes:
        print(note)
    for name, pair in {"all": found.all, **found.by_type}.items():
        error = "" if pair.stderr is None else f" ± {100 * pair.stderr:.1f}"
        low, high = pair.interval or (math.nan, math.nan)
        print(
            f"{name}: B minus A {100 * pair.difference:+.1f}{error} points, 95% interval {100 * low:+.1f} to "
            f"{100 * high:+.1f}; of {pair.n} questions only B is right in {pair.gained}, only A in {pair.lost}"
        )
    for a, b in found.flips:
        print(
            f"  {a.id} ({a.question_type}): A {a.prediction or 'no answer'}, B {b.prediction or 'no answer'}: ", end=""
        )
        print("B is right" if b.correct else "A is right")
