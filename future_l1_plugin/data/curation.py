"""Which records teach most by their future frames: curation by visual gain (Future-L1, arXiv 2606.05769).

A base model answers each question n times as it stands, and n times with the reasoning frames shown as well. p_t and
p_v are the right answers among n. A record is worth latent supervision if the model fails without the frames and
succeeds with them:

    keep p_t <= most_text and p_v - p_t >= least_gain, rank by the gain p_v - p_t, take the top N

Beside them stand a random N of all records, as a control, and records for RL (`Selection`).

Answers and verdicts are kept as they come (`curation_answers`); what is here is computed from them, so that another
selection costs nothing.
"""

import json
import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from future_l1_plugin.data.curation_answers import CONDITIONS, Curation, Score
from future_l1_plugin.data.curation_recipe import CurationRecipe, Selection
from future_l1_plugin.data.records import TwiffRecord
from future_l1_plugin.data.sft import assistant_content
from future_l1_plugin.journal import atomic_write, json_line, key_of
from future_l1_plugin.latent.tokens import END, LATENT, START
from future_l1_plugin.model.engine import Engine
from future_l1_plugin.rewards.format import format_reward


@dataclass(frozen=True)
class Selected:
    """The records that were taken; `rl` by size. `notes`: what fell short of the recipe."""

    sft: list[Score]
    random: list[Score]
    rl: dict[int, list[Score]]
    notes: list[str]


def select(scores: Sequence[Score], rule: Selection) -> Selected:
    """Apply the rule. Ties in gain are broken by a random order that depends on nothing but the seed and the id."""
    shuffled = sorted(scores, key=lambda score: key_of(rule.seed, score.record.id))
    kept = [s for s in shuffled if s.text <= rule.most_text and s.gain >= rule.least_gain]
    sft = sorted(kept, key=lambda score: -score.gain)[: rule.size]
    notes = []
    if len(sft) < rule.size:
        notes.append(f"sft.jsonl: {len(kept):,} records pass the rule, {rule.size:,} were wanted")
    control = random.Random(f"control {rule.seed}").sample(shuffled, len(sft))
    taken = {score.record.id for score in sft}
    free = [s for s in shuffled if s.record.id not in taken and format_reward(_response(s.record)) == 1.0]
    rl = {}
    for size in sorted(rule.rl_sizes):
        if size <= len(free):
            rl[size] = free[:size]
        else:
            notes.append(f"rl_{size}.jsonl: not written, {len(free):,} records are left that have the format")
    return Selected(sft, control, rl, notes)


def _response(record: TwiffRecord) -> str:
    """The record's reasoning as a model would write it, one latent a span."""
    parts = assistant_content(record)
    return "".join(f"{START}{LATENT}{END}" if part["type"] == "image" else part["text"] for part in parts)


def write_selection(scores: Sequence[Score], selected: Selected, n: int, output: Path, video_root: str) -> None:
    """Write `scores.jsonl` and the files of `selected`, each whole or not at all, in the order of selection.

    Rows are Future-L1-50K's: `gain`, `correct_in_8_base` (p_t) and `correct_in_8_hint` (p_v) for n = 8.
    """

    def row(score: Score) -> Mapping[str, Any]:
        marks = {"gain": score.gain, f"correct_in_{n}_base": score.text, f"correct_in_{n}_hint": score.visual}
        record = replace(score.record, extras={**score.record.extras, **marks})
        return record.to_dict(video_root or None)

    _write(output / "scores.jsonl", ({"id": s.record.id, "text": s.text, "visual": s.visual} for s in scores))
    _write(output / "sft.jsonl", map(row, selected.sft))
    _write(output / "random.jsonl", map(row, selected.random))
    for file in output.glob("rl_*.jsonl"):  # of an earlier selection
        file.unlink()
    for size, chosen in selected.rl.items():
        _write(output / f"rl_{size}.jsonl", map(row, chosen))


def _write(path: Path, rows: Iterator[Mapping[str, Any]]) -> None:
    with atomic_write(path) as file:
        for row in rows:
            file.write(json_line(row))


def summary(curation: Curation, scores: Sequence[Score], selected: Selected, undecided: int) -> dict[str, Any]:
    """Counts and shares, as JSON values."""
    n = curation.recipe.rollouts.n
    groups = {"all": scores, "sft": selected.sft, "random": selected.random}
    return {
        "records": len(scores),
        "left_out": len(curation.left_out),
        "without_future_frames": curation.without_frames,
        "answers": 2 * n * len(scores),
        "undecided_counted_wrong": undecided,
        "accuracy": {c: round(sum(getattr(s, c) for s in scores) / (n * len(scores)), 4) for c in CONDITIONS},
        "gain": {str(gain): count for gain, count in sorted(Counter(s.gain for s in scores).items())},
        "selected": {"sft": len(selected.sft), "random": len(selected.random), "rl": sorted(selected.rl)},
        "mean_gain": {name: round(sum(s.gain for s in g) / len(g), 4) for name, g in groups.items() if g},
        "classes": {name: _classes(g) for name, g in groups.items() if g},
        "notes": selected.notes,
    }


def _classes(scores: Sequence[Score]) -> dict[str, float]:
    """Share of each class (`meta_data.classification`); records without one are "unknown"."""
    found = Counter(class_of(score.record) for score in scores)
    return {name: round(count / len(scores), 4) for name, count in sorted(found.items())}


def class_of(record: TwiffRecord) -> str:
    """`meta_data.classification` of a record, or "unknown"."""
    meta = record.extras.get("meta_data")
    return str(meta.get("classification") or "unknown") if isinstance(meta, Mapping) else "unknown"


@dataclass(frozen=True)
class Curated:
    """What `curate` found. `summary` is the content of summary.json."""

    scores: list[Score]
    selected: Selected
    summary: dict[str, Any]


def curate(
    recipe: CurationRecipe,
    shard: tuple[int, int] = (1, 1),
    only_select: bool = False,
    vllm: Callable[..., Engine] | None = None,
) -> Curated | None:
    """Run a shard, and select where all answers are here (a single shard, or `only_select`).

    Returns None for one shard of several.

    Raises:
        ConfigError, DataError, EndpointError: see Curation.
    """
    curation = Curation(recipe, shard, vllm=vllm)
    if not only_select:
        curation.run()
        if shard[1] > 1:
            return None
    scores, undecided = curation.scores()
    selected = select(scores, recipe.select)
    write_selection(scores, selected, recipe.rollouts.n, curation.output, recipe.data.videos)
    found = summary(curation, scores, selected, undecided)
    with atomic_write(curation.output / "summary.json") as file:
        file.write((json.dumps(found, indent=1, ensure_ascii=False) + "\n").encode())
    return Curated(scores, selected, found)
