"""What latents hold: counts and cosines by kind of question, and whether a span is nearest to its own future frame.

A span is compared by its mean, a frame by the mean of what the vision merger makes of it at the size of a training
target, which is what SFT drew the latents to.
"""

import hashlib
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize
from tqdm import tqdm

from future_l1_plugin.data.records import TwiffRecord
from future_l1_plugin.data.sft import SftCollator, SftDataset
from future_l1_plugin.errors import DataError
from future_l1_plugin.evaluation.compare import Sample
from future_l1_plugin.evaluation.interventions import recorded_spans, split_spans
from future_l1_plugin.evaluation.statistics import Metric, clustered_stderr
from future_l1_plugin.journal import key_of
from future_l1_plugin.latent.tokens import END, START
from future_l1_plugin.model import LatentConfig
from future_l1_plugin.model.backbone import PICTURES, TOKEN_KEYS
from future_l1_plugin.model.engine import Decoding, Request, TransformersEngine
from future_l1_plugin.model.objective import OURS, latent_targets
from future_l1_plugin.rewards.diversity import mean_adjacent_cosine


def by_hop(rows: Sequence[Mapping[str, Any]], samples: Sequence[Sample]) -> list[dict[str, Any]]:
    """Means by question type, and of all: spans, latents and text tokens per response, cosine of adjacent spans.

    Args:
        rows: of the response log, with latents recorded.
        samples: of the same run.

    Text tokens are neither latents nor markers of spans. The cosine is `mean_adjacent_cosine` of a response, averaged
    over the `two_spans` responses with at least two spans that hold latents; None if there are none.
    """
    spans = {row["doc_id"]: recorded_spans(row) for row in rows}
    output = {row["doc_id"]: row["output_tokens"] for row in rows}
    table = []
    for kind in (*sorted({sample.question_type for sample in samples}), "all"):
        chosen = [sample for sample in samples if kind in (sample.question_type, "all")]
        cosines = [c for sample in chosen if (c := _adjacent_cosine(spans[sample.doc_id])) is not None]
        text = [output[s.doc_id] - s.latents - s.text.count(START) - s.text.count(END) for s in chosen]
        table.append(
            {
                "question_type": kind,
                "responses": len(chosen),
                "spans": _mean([sample.spans for sample in chosen]),
                "latents": _mean([sample.latents for sample in chosen]),
                "text_tokens": _mean(text),
                "adjacent_cosine": _mean(cosines),
                "two_spans": len(cosines),
            }
        )
    return table


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _adjacent_cosine(spans: Sequence[Tensor]) -> float | None:
    if len(spans) < 2:
        return None
    lengths = torch.tensor([len(span) for span in spans])
    return mean_adjacent_cosine(torch.cat(list(spans)), torch.arange(len(spans)).repeat_interleave(lengths))


# ---- retrieval ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Retrieval:
    """Share of spans whose own future frame is the nearest by cosine, its error clustered by record; chance beside it.

    pool: among `pool_size` frames, the others drawn from the futures of other records. same_clip: among the frames of
    its own record, shown and future: there scene and objects are the same, so only the time is left to tell.
    """

    spans: int
    records: int
    pool_size: int
    pool: Metric
    pool_chance: float
    same_clip: Metric
    same_clip_chance: float


@torch.inference_mode()
def retrieval(
    engine: TransformersEngine,
    records: Sequence[TwiffRecord],
    pool: int = 16,
    batch_size: int = 16,
    seed: int = 0,
    question_media: str = "images",
    max_new_tokens: int = 2048,
) -> Retrieval:
    """Ask the model the records' questions, as SFT shows them, and look for each span's future frame.

    Span m of a response (those without latents aside) belongs to future frame m of the record; further spans or frames
    belong to nothing. Frames that are equal to the pixel count as one.

    Args:
        engine: of the model, which must leave latents alone.

    Raises:
        DataError: too few different future frames for the pool, or no span that belongs to a frame.
    """
    model, processor = engine.model, engine.processor
    config, decoding = LatentConfig.from_hf(model.config), Decoding(max_new_tokens)
    collator = SftCollator(processor, config, question_media)
    dataset = SftDataset(list(records))
    frames: dict[str, Tensor] = {}  # name (hash of the pixels) -> feature (H,)
    shown: list[list[str]] = []  # by record: names of the question's frames and of the future ones
    future: list[list[str]] = []

    def requests(numbers: Sequence[int]) -> list[Request]:
        asked = []
        for number, sample in [(number, dataset[number]) for number in numbers]:
            pictures = [*sample.question_clip.frames, *sample.future.frames]
            names = [hashlib.sha256(picture.tobytes()).hexdigest() for picture in pictures]
            shown.append(list(dict.fromkeys(names)))
            future.append(names[len(sample.question_clip.frames) :])
            frames.update(zip(names, frame_features(model, processor, config, pictures), strict=True))
            asked.append(Request(number, prompt_of(collator([sample])), decoding))
        return asked

    queries: list[tuple[int, Tensor, str]] = []  # record, mean of the span, name of its frame
    batches = [range(len(dataset))[start : start + batch_size] for start in range(0, len(dataset), batch_size)]
    for answers in engine.answers(tqdm(batches, desc="retrieval", unit="batch"), requests):
        for number, answer in answers:
            spans = split_spans(answer.text, answer.latents.cpu())
            queries += [(number, s.float().mean(0), name) for s, name in zip(spans, future[number], strict=False)]
    if not queries:
        raise DataError("retrieval: no response to the records has a span with latents")
    everything = sorted({name for names in future for name in names})
    hits, near, chances, clusters = [], [], [], []
    for number, (record, mean, name) in enumerate(queries):
        others = [other for other in everything if other != name and other not in future[record]]
        if len(others) < pool - 1:
            raise DataError(
                f"retrieval: a pool of {pool} needs {pool - 1} future frames of other records, found {len(others)} "
                "different ones. Use more records, or a smaller --pool."
            )
        distractors = random.Random(key_of(seed, number)).sample(others, pool - 1)
        hits.append(nearest(mean, name, distractors, frames))
        same = [other for other in shown[record] if other != name]
        near.append(nearest(mean, name, same, frames))
        chances.append(1 / (1 + len(same)))
        clusters.append(str(record))
    return Retrieval(
        spans=len(queries),
        records=len(set(clusters)),
        pool_size=pool,
        pool=Metric(_mean(hits), clustered_stderr(hits, clusters)),
        pool_chance=1 / pool,
        same_clip=Metric(_mean(near), clustered_stderr(near, clusters)),
        same_clip_chance=_mean(chances),
    )


def nearest(mean: Tensor, name: str, distractors: Sequence[str], frames: Mapping[str, Tensor]) -> float:
    """1.0 if the frame `name` is nearer to `mean` (H,) than every distractor, else 0.0: a tie is no hit."""
    if not distractors:
        return 1.0
    candidates = normalize(torch.stack([frames[other] for other in (name, *distractors)]), dim=1)
    cosines = candidates @ normalize(mean, dim=0)
    return float(cosines[0] > cosines[1:].max())


def frame_features(model: Any, processor: Any, config: LatentConfig, pictures: Sequence[Any]) -> list[Tensor]:
    """For each picture, uint8 (h, w, 3), the mean of its SFT target e*: float32 (H,), on the CPU."""
    image = processor.image_processor
    area = (image.patch_size * image.merge_size) ** 2
    size = {"shortest_edge": area, "longest_edge": config.max_latent_token * area}
    encoded = image(images=list(pictures), size=size, return_tensors="pt").to(model.device)
    batch = {
        "latent_frames": torch.ones(len(pictures), dtype=torch.long),  # a row each
        "latent_pixel_values": encoded[PICTURES.pixels],
        "latent_grid_thw": encoded[PICTURES.grid],
    }
    return [target.float().mean(0).cpu() for target in latent_targets(model, config, batch)]


def prompt_of(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """A collated record, (1, T), up to its response: what the processor returns for the prompt."""
    end = int(batch["response_start"][0])
    return {
        name: value[:, :end] if name in TOKEN_KEYS else value
        for name, value in batch.items()
        if name not in ("labels", *OURS)
    }
