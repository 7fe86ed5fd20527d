"""Judging the answers of a finished run of TwiFF-Bench: `future-l1 judge`. The task judges by the same `BenchJudge`.

Beside the samples that lmms-eval logged come

    *_judgements.jsonl  a row a judgement, as it comes; run again, only what is missing is judged
    *_judged.json       scores of each judge with standard errors, failures by id, agreement between judges

An item without scores is listed and left out of the means. A run with more than 1% of such items counts as failed.
"""

import asyncio
import functools
import itertools
import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import correlation
from typing import Any

from future_l1_plugin.config import load_recipe
from future_l1_plugin.endpoint.client import ChatClient
from future_l1_plugin.endpoint.errors import EndpointError, NoReply
from future_l1_plugin.endpoint.settings import EndpointSettings
from future_l1_plugin.errors import ConfigError, DataError
from future_l1_plugin.evaluation.results import read_samples, results_file
from future_l1_plugin.evaluation.statistics import clustered_stderr
from future_l1_plugin.evaluation.twiffbench import (
    REMINDER,
    SHOWN,
    Item,
    Scores,
    chat_content,
    judge_message,
    message_mark,
    read_scores,
)
from future_l1_plugin.journal import Journal, atomic_write, key_of

TASK = "twiffbench"
#: The share of items without scores above which a run fails.
FAILURES_ALLOWED = 0.01
#: Items in a row without scores, at which a judge counts as gone.
GIVE_UP_AFTER = 20


# ---- one answer -----------------------------------------------------------------------------------------------------


class BenchJudge:
    """Scores of answers, by the model of `settings`. May be used from threads, as ChatClient may."""

    def __init__(self, settings: EndpointSettings) -> None:
        self.settings = settings
        self._client = ChatClient(settings)
        self._failed_in_a_row = 0
        self._gone: str | None = None

    async def judge(self, item: Item, response: str) -> Scores:
        """Scores of one response.

        Raises:
            NoReply: none for this one. EndpointError: none for anyone: a refused key and the like, or `GIVE_UP_AFTER`
            in a row; from then on each call raises it and sends nothing. DataError: a picture is gone.
        """
        if self._gone:
            raise EndpointError(self._gone, item.id)
        content = await asyncio.to_thread(chat_content, judge_message(item, response))
        try:
            scores = await self._client.ask(content, read_scores, item.id, REMINDER)
        except NoReply as error:
            self._failed_in_a_row += 1
            if self._failed_in_a_row < GIVE_UP_AFTER:
                raise
            self._gone = f"{self._failed_in_a_row} answers in a row got no scores; the last: {error}"
            raise EndpointError(self._gone, item.id) from error
        except EndpointError as error:
            self._gone = str(error)
            raise
        self._failed_in_a_row = 0
        return scores

    def judge_now(self, item: Item, response: str) -> Scores | str:
        """`judge`, blocking; the reason in place of scores that cannot be had."""
        try:
            return asyncio.run(self.judge(item, response))
        except (EndpointError, DataError) as error:
            return str(error)


@functools.cache
def bench_judge(settings: str) -> BenchJudge:
    """The judge of a YAML file of EndpointSettings, one for all threads of a process."""
    return BenchJudge(load_recipe(settings, EndpointSettings))


# ---- all answers of a run -------------------------------------------------------------------------------------------


def judge_run(output_path: str | Path, judges: Sequence[EndpointSettings], progress: bool = True) -> dict[str, Any]:
    """Judge the answers under `output_path` (of lmms-eval, run with --log_samples) by each judge; write the files.

    Returns the content of *_judged.json: {"answers": N, "judges": {model: `metrics`}, "agreement": {"a | b": ..}}.

    Raises:
        DataError: no results or samples of the task, or a picture that is gone.
        ConfigError: no judge, or two of one name; see ChatClient.
        EndpointError: a judge is gone or refuses everyone. What was judged is kept.
    """
    names = [settings.model for settings in judges]
    if not names or len(set(names)) < len(names):
        raise ConfigError(f"expected judges with different models, found {', '.join(names) or 'none'}")
    asked = [BenchJudge(settings) for settings in judges]
    results = results_file(output_path)
    samples = read_samples(output_path, TASK)
    answers = [(Item.from_doc(sample["judged"]["item"]), sample["judged"]["response"]) for sample in samples]
    journal = Journal(_beside(results, "judgements.jsonl"))
    rows = {judge.settings.model: _judge_all(judge, answers, journal, progress) for judge in asked}
    judged = {
        "answers": len(answers),
        "judges": {name: metrics(found) for name, found in rows.items()},
        "agreement": {f"{a} | {b}": agreement(rows[a], rows[b]) for a, b in itertools.combinations(names, 2)},
    }
    with atomic_write(_beside(results, "judged.json")) as file:
        file.write(json.dumps(judged, indent=2, ensure_ascii=False).encode())
    return judged


def _beside(results: Path, name: str) -> Path:
    return results.with_name(results.name.replace("results.json", f"{TASK}_{name}"))


def _judge_all(
    judge: BenchJudge, answers: Sequence[tuple[Item, str]], journal: Journal, progress: bool
) -> list[dict[str, Any]]:
    """A row an answer, in order: {"id", "video", "classification"} and either the scores or "failure", the reason."""
    from tqdm import tqdm

    from future_l1_plugin.data.rollouts import each

    settings = judge.settings
    keys = [
        key_of(settings.model, settings.temperature, message_mark(judge_message(item, response)))
        for item, response in answers
    ]
    known = journal.read()
    pending = {key: answer for key, answer in zip(keys, answers, strict=True) if key not in known}
    failures: dict[str, str] = {}
    bar = tqdm(
        total=len(set(keys)),
        initial=len(set(keys)) - len(pending),
        desc=settings.model,
        unit="answer",
        disable=None if progress else True,
    )

    async def one(entry: tuple[str, tuple[Item, str]]) -> None:
        key, (item, response) = entry
        try:
            scores = await judge.judge(item, response)
        except NoReply as error:
            failures[key] = str(error)
        else:
            known[key] = {"key": key, "judge": settings.model, "id": item.id, **asdict(scores)}
            journal.append([known[key]])
        bar.update()

    with bar:
        asyncio.run(each(pending.items(), one, settings.max_concurrency))
    return [
        {"id": item.id, "video": item.video, "classification": item.classification}
        | ({"failure": failures[key]} if key in failures else {name: known[key][name] for name in ("cot", "answer")})
        for key, (item, _) in zip(keys, answers, strict=True)
    ]


# ---- numbers --------------------------------------------------------------------------------------------------------


def metrics(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Scores of rows as `_judge_all` makes them, over all and by classification.

    {"n": items, "judged": those with scores, "judge_failure_rate": .., "cot" | "answer" | "average": {"mean",
    "stderr"}, "by_class": {name: the same}, "failures": {id: reason}}. The standard error is clustered by video.
    """
    groups = defaultdict(list)
    for row in rows:
        if row["classification"]:
            groups[row["classification"]].append(row)
    return {
        **_scores(rows),
        "by_class": {name: _scores(group) for name, group in sorted(groups.items())},
        "failures": {row["id"]: row["failure"] for row in rows if "failure" in row},
    }


def _scores(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    good = [row for row in rows if "failure" not in row]
    videos = [row["video"] for row in good]
    columns = {name: [row[name] for row in good] for name in ("cot", "answer")}
    columns["average"] = [(row["cot"] + row["answer"]) / 2 for row in good]
    return {
        "n": len(rows),
        "judged": len(good),
        "judge_failure_rate": 1 - len(good) / len(rows),
        **{
            name: {
                "mean": sum(values) / len(values) if values else None,
                "stderr": clustered_stderr(values, videos),
            }
            for name, values in columns.items()
        },
    }


def agreement(a: Iterable[Mapping[str, Any]], b: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """How far two judges agree on the items that both scored: {"n", "cot" | "answer": {"pearson" (None where a judge
    gives one score to all), "mean_abs_difference", "within_1": share of items at most 1 apart}}."""
    pairs = [(x, y) for x, y in zip(a, b, strict=True) if "failure" not in x and "failure" not in y]
    found: dict[str, Any] = {"n": len(pairs)}
    for name in ("cot", "answer") if pairs else ():
        ours, theirs = ([row[name] for row in side] for side in zip(*pairs, strict=True))
        apart = [abs(x - y) for x, y in zip(ours, theirs, strict=True)]
        found[name] = {
            "pearson": _pearson(ours, theirs),
            "mean_abs_difference": sum(apart) / len(apart),
            "within_1": sum(d <= 1 for d in apart) / len(apart),
        }
    return found


def _pearson(x: Sequence[float], y: Sequence[float]) -> float | None:
    if len(set(x)) < 2 or len(set(y)) < 2:
        return None
    return correlation(x, y)


def too_many(failures: int, items: int) -> bool:
    """Whether so many items without scores make a run fail."""
    return failures > FAILURES_ALLOWED * items


# ---- on the terminal ------------------------------------------------------------------------------------------------


def print_judged(judged: Mapping[str, Any]) -> bool:
    """Tables and failures on the terminal; returns whether every judge scored enough items."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console()
    table = Table(title=f"{TASK}, {judged['answers']:,} answers, scores 0 to 5", title_justify="left")
    table.add_column("judge", overflow="fold")
    for column in ("n", "CoT", "Answer", "average", "failed"):
        table.add_column(column, justify="right", no_wrap=True)
    for name, found in judged["judges"].items():
        for row, scores in {name: found, **{f"  {group}": of for group, of in found["by_class"].items()}}.items():
            cells = [_cell(scores[key]) for key in ("cot", "answer", "average")]
            table.add_row(escape(row), f"{scores['judged']:,}", *cells, f"{scores['judge_failure_rate']:.1%}")
    console.print(table)
    for names, found in judged["agreement"].items():
        for key in ("cot", "answer") if found["n"] else ():
            r = found[key]["pearson"]
            console.print(
                f"{names}, {key}: Pearson {'-' if r is None else f'{r:.2f}'}, mean difference "
                f"{found[key]['mean_abs_difference']:.2f}, within 1: {found[key]['within_1']:.1%} (n {found['n']:,})",
                markup=False,
            )
    enough = True
    for name, found in judged["judges"].items():
        if failures := found["failures"]:
            fails = too_many(len(failures), found["n"])
            enough &= not fails
            verdict = f"; more than {FAILURES_ALLOWED:.0%}: the run has FAILED" if fails else ""
            text = f"{name}: {len(failures)} items have no scores and are in no mean{verdict}"
            console.print(text, style="bold red", markup=False)
            for sample, reason in list(failures.items())[:SHOWN]:
                console.print(f"  {sample}: {reason}", markup=False)
            if len(failures) > SHOWN:
                console.print(f"  .. and {len(failures) - SHOWN} more")
            console.print("Run the same command again: it asks for these alone.")
    return enough


def _cell(score: Mapping[str, float | None]) -> str:
    if score["mean"] is None:
        return "-"
    return f"{score['mean']:.2f}" + ("" if score["stderr"] is None else f" ± {score['stderr']:.2f}")
