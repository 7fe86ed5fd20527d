"""Do the latents matter? futurebench again and again, each time with something else in the latents' place.

    future-l1 probe --model PATH [--limit N] [--batch-size B] [--out DIR] [--seed S]

The conditions are those of `evaluation.probe`. Each is a run of lmms-eval's own evaluator on the futurebench task with
the model `future_l1`, so frames, prompts and batches are the benchmark's, and "left alone" is its result. Responses are
kept in OUT/answers.jsonl as they come, with the recorded latents: after a kill, run the same command again.
"""

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lmms_eval.api.instance import Instance
from loguru import logger
from torch import Tensor

from future_l1_plugin.errors import ConfigError, DataError
from future_l1_plugin.evaluation.compare import TASK, Sample, paired
from future_l1_plugin.evaluation.interventions import Intervention, Replace, packed, recorded_spans
from future_l1_plugin.evaluation.probe import (
    ALONE,
    BUDGETS,
    RECORDS,
    SPOILT,
    Outcome,
    ProbeResult,
    RecordsToShow,
    replacements,
)
from future_l1_plugin.evaluation.probe_latents import by_hop, retrieval
from future_l1_plugin.evaluation.statistics import Metric, clustered_stderr
from future_l1_plugin.integrations.lmms_eval.adapter import FutureL1
from future_l1_plugin.integrations.lmms_eval.settings import Generation
from future_l1_plugin.journal import key_of
from future_l1_plugin.latent import SpanBudget
from future_l1_plugin.model import LatentConfig
from future_l1_plugin.model.engine import Answer, Request, TransformersEngine
from future_l1_plugin.paths import lmms_tasks_dir


class ProbedModel(FutureL1):
    """The model of the task, under one condition at a time. Greedy, with deterministic latents."""

    def __init__(self, seed: int = 0, **arguments: Any) -> None:
        if arguments.get("engine", "hf") != "hf":
            raise ConfigError("probe: expected engine=hf, where alone latents can be replaced; leave the argument out")
        super().__init__(**arguments)
        if self._random_latents:
            raise ConfigError("probe: expected the deterministic policy, under which conditions differ in nothing else")
        self._seed = seed
        self.rows: list[dict[str, Any]] = []  # of the response log, of the newest run
        self.recorded: dict[int, list[Tensor]] = {}  # doc_id -> its spans that hold latents, of the run left alone
        self._replace: dict[int, Replace] = {}
        self._span_budget: SpanBudget | None = None

    def clean(self) -> None:
        """lmms-eval calls it after each run; the weights are needed for the next condition."""

    def set_condition(self, condition: str) -> None:
        """Choose what the next run is to do. All but "left alone" need `recorded`."""
        self._replace, self._span_budget = {}, None
        identity = None if condition == ALONE else [condition]
        if condition in SPOILT:
            self._replace = replacements(condition, self.recorded, self._seed)
            identity += [self._seed, self._recording]  # what is replayed, and to whom, depends on the recording
        elif condition != ALONE:
            exact = self._latent_config().budget.exact
            self._span_budget = SpanBudget(int(condition.removeprefix("budget ")), exact)
        self._identity["condition"] = identity  # part of each response's key

    def plain(self) -> TransformersEngine:
        """An engine with the same weights that leaves latents alone, whatever the condition."""
        return TransformersEngine(lambda: (self._engine.model, self._build.processor))

    def _latent_config(self) -> LatentConfig:
        return LatentConfig.from_hf(self._engine.model.config)

    def _respond(self, requests: list[Instance]) -> list[dict[str, Any] | None]:
        self.generation = Generation.from_task(requests[0].args[2])
        if self.generation.temperature > 0 or self.generation.until:
            raise ConfigError(f"probe: expected greedy decoding without stop strings, found {self.generation}")
        rows = super()._respond(requests)
        self.rows = [row for row in rows if row]
        if self._identity["condition"] is None:
            self.recorded = {row["doc_id"]: recorded_spans(row) for row in self.rows}
            self._recording = key_of([[row["doc_id"], row["latents"]] for row in self.rows])
        return rows

    def _latents_from(self, requests: Sequence[Request]) -> dict[str, Any]:
        if self._span_budget is not None:
            return {"policy": self.policy, "budget": self._span_budget}
        if not self._replace:
            return {"policy": self.policy}
        rows = [self._replace.get(request.key.document[2]) for request in requests]
        policy = Intervention(self._latent_config().tokens, rows)
        return {"policy": policy, "on_token": policy.see}

    def _kept(self, answer: Answer) -> dict[str, Any]:
        return {"latents": packed(answer.latents)} if self._identity["condition"] is None else {}

    @property
    def touched(self) -> int | None:
        """Of the newest run, see `Outcome`."""
        if self._span_budget is not None or self._identity["condition"] is None:
            return None
        return sum(row["latent_tokens"] > 0 and row["doc_id"] in self._replace for row in self.rows)


def probe(
    path: str | Path,
    out: str | Path,
    limit: int | None = None,
    batch_size: int = 1,
    seed: int = 0,
    model_args: str = "",
    gen_kwargs: str | None = None,
    show: RecordsToShow | None = None,
) -> ProbeResult:
    """Run futurebench under every condition; look into the latents of the run that left them alone.

    Args:
        path: latent checkpoint.
        out: folder; responses are kept in its answers.jsonl.
        limit: questions, the first of the task, and as many records; None = all questions.
        seed: of noise, shuffling and swapping, of the records and pools of `show`.
        model_args, gen_kwargs: further ones, as lmms-eval's --model_args and --gen_kwargs.
        show: records whose future frames are looked for in the latents.

    Raises:
        DataError, ConfigError: as lmms-eval's run of the task; no response opens a span; sampling.
    """
    from lmms_eval.utils import simple_parse_args_string

    given = simple_parse_args_string(model_args)
    ours = {"pretrained": str(path), "batch_size": batch_size, "responses": str(Path(out) / "answers.jsonl")}
    if taken := sorted(given.keys() & (ours.keys() | {"seed"})):
        raise ConfigError(f"--model-args: {', '.join(taken)} follow from --model, --batch-size, --out and --seed")
    model = ProbedModel(seed=seed, **ours, **given)
    alone = _run(model, ALONE, limit, gen_kwargs)
    if not any(model.recorded.values()):
        raise DataError(
            f"{path}: none of its {len(alone.samples)} responses has a latent, so there is nothing to probe. Name a "
            "checkpoint after latent SFT."
        )
    latents = by_hop(model.rows, alone.samples)
    outcomes = [alone]
    for condition in (*SPOILT, *(f"budget {n}" for n in BUDGETS)):
        found = _run(model, condition, limit, gen_kwargs)
        outcomes.append(replace(found, against=paired(found.samples, alone.samples)))
    found = None
    if show is not None:
        records = list(show.records)
        records = random.Random(seed).sample(records, min(len(records), limit or RECORDS, RECORDS))
        settings = {"max_new_tokens": model.generation.max_new_tokens, "batch_size": batch_size, "seed": seed}
        found = retrieval(model.plain(), records, show.pool, question_media=show.question_media, **settings)
    return ProbeResult(outcomes, latents, found, model.describe())


def _run(model: ProbedModel, condition: str, limit: int | None, gen_kwargs: str | None) -> Outcome:
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.tasks import TaskManager

    logger.info(f"probe: latents {condition}")
    model.set_condition(condition)
    tasks = TaskManager(include_path=str(lmms_tasks_dir()), include_defaults=False, model_name="future_l1")
    found = simple_evaluate(model=model, tasks=[TASK], task_manager=tasks, limit=limit, gen_kwargs=gen_kwargs)
    samples = [Sample.from_row(row) for row in found["samples"][TASK]]
    right, videos = [float(sample.correct) for sample in samples], [sample.video for sample in samples]
    accuracy = Metric(found["results"][TASK]["future_acc,none"], clustered_stderr(right, videos))
    return Outcome(condition, accuracy, None, model.touched, sorted(samples, key=lambda sample: sample.doc_id))
