"""FutureBench for lmms-eval: items from a local file or the hub, prompts, scores.

lmms-eval executes this file anew for every `!function` of futurebench.yaml, so nothing here may be costly at import. An
item's schema stands in `future_l1_plugin.data.futurebench`.
"""

import math
import os
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from future_l1_plugin.data.futurebench import FutureBenchItem, load_items
from future_l1_plugin.data.sources import listed
from future_l1_plugin.errors import ConfigError, DataError
from future_l1_plugin.integrations.lmms_eval.items import store_items
from future_l1_plugin.integrations.lmms_eval.provenance import data_hash, provenance
from future_l1_plugin.rewards.answer import option_letter

VERSION = 1.0
HUB_DATASET, HUB_FILE = "haonan3/V1-33K", "futurebench.json"
#: question_type of an item -> the metric it counts for
METRIC_OF_TYPE = {"hop1": "hop1_acc", "hop2": "hop2_acc", "hop3": "hop3_acc", "hop5": "interpolation_acc"}


# ---- data -----------------------------------------------------------------------------------------------------------


def __getattr__(name: str) -> Any:
    """Attributes for the YAML that are computed when the task is loaded, not when it is listed."""
    if name == "dataset_kwargs":
        return {"data_files": {"test": str(prepare())}}
    if name == "metadata":
        source, docs = read_docs()
        videos = {doc["video_path"]: video_file(doc) for doc in docs}
        data = {"source": source, "items": len(docs), "hash": data_hash(docs, videos)}
        return {"version": VERSION, "future_l1": provenance(data)}
    raise AttributeError(f"module {__name__} has no attribute {name}")


def prepare() -> Path:
    """Read, check and store the items; return the file for `datasets`.

    The copy holds the fields of the schema only, with ids as text: `datasets` refuses columns of mixed types, and the
    original may carry others. Its name contains its content's hash.

    Raises DataError: no such file, malformed items, missing videos.
    """
    _, docs = read_docs()
    check_videos(docs)
    return store_items("futurebench", docs)


def read_docs() -> tuple[str, list[dict[str, Any]]]:
    """(what to call the source in errors, checked items) from FUTUREBENCH_DATA or the hub."""
    source, path = _file()
    return source, [item.to_dict() for item in load_items(path, source)]


def _file() -> tuple[str, Path]:
    if local := os.environ.get("FUTUREBENCH_DATA"):
        path = Path(local).expanduser()
        if not path.is_file():
            raise DataError(
                f"FUTUREBENCH_DATA={local}: no such file. Expected a JSON or JSONL file of FutureBench items; unset "
                f"the variable to take {HUB_FILE} from {HUB_DATASET} on the hub."
            )
        return str(path), path
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    source = f"{HUB_DATASET}/{HUB_FILE}"
    try:
        return source, Path(hf_hub_download(HUB_DATASET, HUB_FILE, repo_type="dataset"))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise DataError(
            f"{source}: cannot be fetched from the hub ({type(error).__name__}: {error}). "
            f"Set FUTUREBENCH_DATA to a local copy of {HUB_FILE}."
        ) from error


def check_videos(docs: list[dict[str, Any]]) -> None:
    """Raise a DataError that counts and names the videos that are not there or are empty."""
    bad = {}
    for doc in docs:
        path = video_file(doc)
        if path in bad:
            continue
        try:
            size = path.stat().st_size if path.is_file() else None
        except OSError as error:
            raise DataError(f"id {doc['id']!r}: {path}: cannot be read ({error.strerror})") from error
        if not size:
            bad[path] = f"{path}{' is empty' if size == 0 else ''} (id {doc['id']!r})"
    if bad:
        videos = len({video_file(doc) for doc in docs})
        raise DataError(
            f"{len(bad)} of {videos} videos are missing. Set FUTUREBENCH_VIDEO_DIR to the folder that holds them "
            f"(it is {os.environ.get('FUTUREBENCH_VIDEO_DIR')!r}), or remove their items.{listed(list(bad.values()))}"
        )


def video_file(doc: dict[str, Any]) -> Path:
    """Where an item's video lies: the part of video_path after "video_dataset/" under FUTUREBENCH_VIDEO_DIR."""
    root = os.environ.get("FUTUREBENCH_VIDEO_DIR")
    if not root:
        raise ConfigError("FUTUREBENCH_VIDEO_DIR is not set. Set it to the folder that holds the FutureBench videos.")
    return FutureBenchItem.from_dict(doc).video_file(root)


# ---- prompt ---------------------------------------------------------------------------------------------------------


def doc_to_visual(doc: dict[str, Any]) -> list[str]:
    """The path of the video."""
    return [str(video_file(doc))]


def doc_to_text(doc: dict[str, Any], lmms_eval_specific_kwargs: dict[str, str] | None = None) -> str:
    """The question with its options; what stands around it depends on the model (see the YAML)."""
    around = lmms_eval_specific_kwargs or {}
    return FutureBenchItem.from_dict(doc).prompt(around.get("pre_prompt", ""), around.get("post_prompt", ""))


def doc_to_target(doc: dict[str, Any]) -> str:
    """The right letter."""
    return doc["qa"]["Answer"]


# ---- scores ---------------------------------------------------------------------------------------------------------


def process_results(doc: dict[str, Any], results: list[str]) -> dict[str, dict[str, Any]]:
    """Records of one item for each metric.

    An item counts for one of the per-hop metrics; for the others it leaves an empty record, which aggregations and
    lmms-eval's standard errors pass over (a metric that is left out would make lmms-eval report a wrong sample count).
    """
    letter = option_letter(results[0], doc["qa"]["Options"])
    score = float(letter == doc["qa"]["Answer"])
    video = doc["video_path"]
    record = {"score": score, "video": video}
    # No "score": lmms-eval would compute the standard error of the micro average from it.
    macro = {"correct": score, "question_type": doc["question_type"], "video": video}
    return {
        "future_acc": {**record, "id": doc["id"], "question_type": doc["question_type"], "prediction": letter},
        **{
            metric: record if question_type == doc["question_type"] else {}
            for question_type, metric in METRIC_OF_TYPE.items()
        },
        "macro_acc": macro,
        "macro_acc_stderr": macro,  # after macro_acc: it overwrites the "N/A" that lmms-eval puts there
        "parse_failure_rate": {"score": float(letter is None), "video": video},
    }


def mean_score(records: Iterable[dict[str, Any]]) -> float | str:
    """Mean of the scores; "N/A", as lmms-eval writes it, if no record has one (a --limit that leaves a hop out)."""
    scores = [record["score"] for record in records if "score" in record]
    return sum(scores) / len(scores) if scores else "N/A"


def _by_type(records: Iterable[dict[str, Any]]) -> dict[str, list[tuple[float, str]]]:
    groups = defaultdict(list)
    for record in records:
        groups[record["question_type"]].append((record["correct"], record["video"]))
    return groups


def macro_mean(records: Iterable[dict[str, Any]]) -> float:
    """Mean over the question types of the mean over their items; types without items do not enter."""
    means = [sum(score for score, _ in group) / len(group) for group in _by_type(records).values()]
    return sum(means) / len(means)


def macro_stderr(records: Iterable[dict[str, Any]]) -> float | str:
    """Standard error of `macro_mean`, clustered by video; "N/A" if a type has a single item.

    The macro average is a weighted mean with weight w = 1 / (types * items of the type). Types are strata:
    Var = sum over types of s_type^2 / n_type / types^2, and to it come the products w_i e_i w_j e_j of different items
    of one video, e being the distance from the mean of the item's type (equation 4 of arXiv 2411.00640, by stratum).
    """
    groups = _by_type(records)
    variance, by_video = 0.0, defaultdict(list)
    for group in groups.values():
        n = len(group)
        if n < 2:
            return "N/A"
        mean = sum(score for score, _ in group) / n
        errors = [((score - mean) / n / len(groups), video) for score, video in group]
        variance += sum(error**2 for error, _ in errors) * n / (n - 1)
        for error, video in errors:
            by_video[video].append(error)
    for errors in by_video.values():
        variance += sum(errors) ** 2 - sum(error**2 for error in errors)
    return math.sqrt(max(variance, 0.0))
