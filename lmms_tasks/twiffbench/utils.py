"""TwiFF-Bench for lmms-eval: items from a local file or the hub, prompts, scores of a judge.

lmms-eval executes this file anew for every `!function` of twiffbench.yaml, so nothing here may be costly at import; the
judge is in `future_l1_plugin.evaluation.judging`, once for all.
"""

import os
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from future_l1_plugin.errors import DataError
from future_l1_plugin.evaluation.twiffbench import HUB, SHOWN, Item, Scores, interleaved, load_items
from future_l1_plugin.integrations.lmms_eval.items import items_folder, store_items
from future_l1_plugin.integrations.lmms_eval.provenance import data_hash, provenance

VERSION = 1.0

# ---- data -----------------------------------------------------------------------------------------------------------


def __getattr__(name: str) -> Any:
    """Attributes for the YAML that are computed when the task is loaded, not when it is listed."""
    if name == "dataset_kwargs":
        from future_l1_plugin.evaluation.judging import bench_judge

        bench_judge.cache_clear()  # in one process a next run may have other settings, or the judge be back
        _judge()  # settings are checked before anything is generated
        return {"data_files": {"test": str(prepare())}}
    if name == "metadata":
        return {"version": VERSION, "future_l1": provenance(_data())}
    raise AttributeError(f"module {__name__} has no attribute {name}")


def prepare() -> Path:
    """Read, check and store the items; return the file for `datasets`."""
    return store_items("twiffbench", (asdict(item) for item in read_items()))


def read_items() -> list[Item]:
    """All items, checked; pictures that were embedded are stored in the datasets cache. Errors: see `load_items`."""
    local = os.environ.get("TWIFFBENCH_DATA")
    try:
        return load_items(Path(local).expanduser() if local else HUB, items_folder() / "twiffbench-pictures")
    except DataError as error:
        fix = "TWIFFBENCH_DATA names it." if local else "Or set TWIFFBENCH_DATA to a local folder or file of it."
        raise DataError(f"{error}\n{fix}") from error


def _data() -> dict[str, Any]:
    """What `provenance` tells of the items: pictures by size, wherever they lie."""
    items = read_items()
    texts = [{key: value for key, value in asdict(item).items() if not key.endswith("_images")} for item in items]
    pictures = {
        f"{item.id} {i}": file for item in items for i, file in enumerate(item.question_images + item.chain_images)
    }
    source = os.environ.get("TWIFFBENCH_DATA") or HUB
    return {"source": source, "items": len(items), "hash": data_hash(texts, pictures)}


# ---- prompt ---------------------------------------------------------------------------------------------------------


def doc_to_text(doc: dict[str, Any], lmms_eval_specific_kwargs: dict[str, str] | None = None) -> str:
    """The question, `<image>` for each picture, and what the model is asked to do (see the YAML)."""
    post = "" if "<answer>" in doc["question"] else (lmms_eval_specific_kwargs or {}).get("post_prompt", "")
    return doc["question"] + post


def doc_to_messages(
    doc: dict[str, Any], lmms_eval_specific_kwargs: dict[str, str] | None = None
) -> list[dict[str, Any]]:
    """The same as one user turn, pictures (paths) in their places."""
    parts = interleaved(doc_to_text(doc, lmms_eval_specific_kwargs), doc["question_images"])
    content = [
        {"type": "text", "text": part} if isinstance(part, str) else {"type": "image", "url": str(part)}
        for part in parts
    ]
    return [{"role": "user", "content": content}]


def doc_to_visual(doc: dict[str, Any]) -> list[Any]:
    """The pictures of the question, RGB."""
    from PIL import Image

    return [Image.open(path).convert("RGB") for path in doc["question_images"]]


def doc_to_target(doc: dict[str, Any]) -> str:
    """The reference answer."""
    return doc["answer"]


# ---- scores ---------------------------------------------------------------------------------------------------------


def _judge() -> Any:
    """The BenchJudge of TWIFFBENCH_JUDGE, or None."""
    if not (settings := os.environ.get("TWIFFBENCH_JUDGE")):
        return None
    from future_l1_plugin.evaluation.judging import bench_judge

    return bench_judge(settings)


def process_results(doc: dict[str, Any], results: list[str]) -> dict[str, dict[str, Any]]:
    """Records of one item for each metric; without a judge or its scores, empty ones, which all means pass over.

    The record of `judged` holds all that a judge needs, so that `future-l1 judge` works from the logged samples alone.
    Nothing is raised here: lmms-eval would try five times and hide the message. `count_judged` does.
    """
    item, judge = Item.from_doc(doc), _judge()
    scores = judge.judge_now(item, results[0]) if judge else None
    records: dict[str, dict[str, Any]] = {
        "judged": {"item": asdict(item), "response": results[0], "asked": judge is not None, "failure": None}
    }
    columns: dict[str, float] = {}
    if isinstance(scores, Scores):
        columns = {"cot": scores.cot, "answer": scores.answer, "average": (scores.cot + scores.answer) / 2}
    else:
        records["judged"]["failure"] = scores
    for name in ("cot", "answer", "average"):
        records[name] = {"score": columns[name], "video": item.video} if columns else {}
    records["judge_failure_rate"] = {"score": float(not columns), "video": item.video} if judge else {}
    records["by_class"] = {"classification": item.classification, **columns} if columns and item.classification else {}
    return records


def mean_score(records: Iterable[dict[str, Any]]) -> float | str:
    """Mean of the scores; "N/A", as lmms-eval writes it, if no record has one."""
    scores = [record["score"] for record in records if "score" in record]
    return sum(scores) / len(scores) if scores else "N/A"


def by_class(records: Iterable[dict[str, Any]]) -> dict[str, dict[str, float]] | str:
    """Mean scores by meta_data.classification; "N/A" without any."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        if record:
            groups.setdefault(record["classification"], []).append(record)
    return {
        name: {"n": len(group)}
        | {score: sum(record[score] for record in group) / len(group) for score in ("cot", "answer", "average")}
        for name, group in sorted(groups.items())
    } or "N/A"


def count_judged(records: Iterable[dict[str, Any]]) -> int:
    """How many items have scores; says loudly which have none, and why.

    Raises DataError: more than 1% of the items have none. Their answers are in the response log of the model.
    """
    from loguru import logger

    from future_l1_plugin.evaluation.judging import too_many

    records = list(records)
    if not any(record["asked"] for record in records):
        logger.warning(
            "twiffbench: answers were NOT judged, its scores are N/A. Score the logged ones (--output_path OUT "
            "--log_samples) by `future-l1 judge OUT --judge judge.yaml`, or set TWIFFBENCH_JUDGE to a judge's YAML."
        )
        return 0
    failures = [f"  {record['item']['id']}: {record['failure']}" for record in records if record["failure"]]
    if failures:
        more = [f"  .. and {len(failures) - SHOWN} more"] * (len(failures) > SHOWN)
        listed = "\n".join([*failures[:SHOWN], *more])
        message = f"twiffbench: {len(failures)} of {len(records)} answers got no scores and are in no mean.\n{listed}"
        if too_many(len(failures), len(records)):
            raise DataError(
                f"{message}\nThat is more than 1%, so the run has failed. Every answer is kept in the model's log: run "
                "the same command again, with `cache` in the judge's settings to keep the scores as well."
            )
        logger.error(message)
    return len(records) - len(failures)
