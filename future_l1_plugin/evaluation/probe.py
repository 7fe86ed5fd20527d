"""What `future-l1 probe` puts in the latents' place, and what comes of it (run by `integrations.lmms_eval.probe`).

Conditions: latents left alone; zeroed; replaced by Gaussian noise of the same norm; shuffled (a span is fed what
another span of the same response held); swapped (those of another question); and spans of at most 0, 1, 2, 4 and 8
latents, or of exactly so many for a checkpoint with a fixed budget. At 0 a span opens and closes at once. Shuffled and
swapped replay what the run with latents left alone recorded. A response with a single span cannot be shuffled and is
left alone; `touched` counts the others.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from future_l1_plugin.data.records import TwiffRecord
from future_l1_plugin.evaluation.compare import Sample
from future_l1_plugin.evaluation.interventions import Replace, derangement, noised, replayed, zeroed
from future_l1_plugin.evaluation.probe_latents import Retrieval
from future_l1_plugin.evaluation.statistics import Metric, Paired

ALONE = "left alone"
SPOILT = ("zeroed", "noise", "shuffled", "swapped")
BUDGETS = (0, 1, 2, 4, 8)
RECORDS = 256


@dataclass(frozen=True)
class Outcome:
    """What a condition came to. against: minus "left alone" on the same questions; None for that itself.

    touched: questions in whose response a latent was replaced; None where none is meant to be.
    """

    condition: str
    accuracy: Metric
    against: Paired | None
    touched: int | None
    samples: list[Sample]


def replacements(condition: str, recorded: Mapping[int, list[Tensor]], seed: int) -> dict[int, Replace]:
    """What replaces the latents of each question, by doc_id; a question that is missing is left alone."""
    if condition == "zeroed":
        return dict.fromkeys(recorded, zeroed)
    if condition == "noise":
        return {doc: noised(seed, doc) for doc in recorded}
    if condition == "shuffled":
        orders = {doc: derangement(len(spans), [seed, doc]) for doc, spans in recorded.items() if len(spans) > 1}
        return {doc: replayed([recorded[doc][i] for i in order]) for doc, order in orders.items()}
    docs = [doc for doc, spans in recorded.items() if spans]
    if len(docs) < 2:
        return {}
    return {doc: replayed(recorded[docs[j]]) for doc, j in zip(docs, derangement(len(docs), seed), strict=True)}


@dataclass(frozen=True)
class ProbeResult:
    """outcomes: "left alone" first. latents: `by_hop` of that run. retrieval: None if there were no records."""

    outcomes: list[Outcome]
    latents: list[dict[str, Any]]
    retrieval: Retrieval | None
    model: dict[str, Any]  # what the model says of itself, as in results.json


@dataclass(frozen=True)
class RecordsToShow:
    """TwiFF records for `retrieval`, and how: see there. Of more than RECORDS records so many are drawn by the seed."""

    records: Sequence[TwiffRecord]
    pool: int = 16
    question_media: str = "images"
