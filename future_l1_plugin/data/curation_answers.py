"""A base model's answers to the questions of a curation, with and without the future frames, and how many are right.

Everything that costs is kept as it comes, in two journals of the output folder, and the rest is computed from them:

    rollouts.jsonl (rollouts.rank1.jsonl, .. of further shards)      answers of the model
    verdicts.jsonl (..)                                             what a judge says of answers that no rule decides

so a killed run goes on where it was, and machines can share the work (`shard`).
"""

import asyncio
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from tqdm import tqdm

from future_l1_plugin.config import save_recipe
from future_l1_plugin.data.curation_recipe import CurationRecipe
from future_l1_plugin.data.prompt import RlPrompt, twiff_prompt
from future_l1_plugin.data.record_files import load_records
from future_l1_plugin.data.records import TwiffRecord
from future_l1_plugin.data.rollouts import Answerer, Attempt, EndpointAnswerer, LocalAnswerer, each, stable_hash
from future_l1_plugin.data.sft import check_records
from future_l1_plugin.errors import ConfigError, DataError
from future_l1_plugin.journal import Journal, key_of
from future_l1_plugin.model.engine import Decoding, Engine, TransformersEngine, load_any
from future_l1_plugin.rewards.accuracy import accuracy
from future_l1_plugin.rewards.answer import extract_answer
from future_l1_plugin.rewards.judge import JudgeItem, JudgeUnavailable, build_judge

TEXT, VISUAL = "text", "visual"
CONDITIONS = (TEXT, VISUAL)


@dataclass(frozen=True)
class Score:
    """How often the base model is right, of n, without and with the reasoning frames."""

    record: TwiffRecord
    text: int
    visual: int

    @property
    def gain(self) -> int:
        return self.visual - self.text


def shard_of(words: str) -> tuple[int, int]:
    """ "I/N" as the numbers that `Curation` takes as its shard. Raises ConfigError."""
    if not (found := re.fullmatch(r"(\d+)/(\d+)", words)):
        raise ConfigError(f"--shard {words}: expected I/N, such as 1/8")
    return int(found[1]), int(found[2])


class Curation:
    """One recipe at work on one shard.

    Args:
        recipe: checked.
        shard: (i, n), this process' share of the records, 1 <= i <= n. Shares are the same on every machine.
        vllm: makes the engine of `rollouts.engine: vllm`, which is above this layer
            (`integrations.vllm.engine.VllmEngine`).

    Raises:
        ConfigError: a shard that does not exist, or what the answerer refuses.
        DataError: records that cannot be used, as `load_records` and `check_records`.
    """

    def __init__(
        self,
        recipe: CurationRecipe,
        shard: tuple[int, int] = (1, 1),
        progress: bool = True,
        vllm: Callable[..., Engine] | None = None,
    ) -> None:
        self.recipe, self.shard, self._progress, self._vllm = recipe, shard, progress, vllm
        part, parts = shard
        if not 1 <= part <= parts:
            raise ConfigError(f"--shard {part}/{parts}: expected I/N with 1 <= I <= N")
        data = recipe.data
        records = load_records(data.records, data.videos or None, data.on_bad)
        records = check_records(records, data.on_bad)
        self.left_out = list(records.bad)
        self.records = [record for record in records if record.image and record.reasoning_image]
        if not self.records:
            raise DataError(f"{data.records}: no record has frames in both its question and its reasoning.")
        self.without_frames = len(records) - len(self.records)
        self.output = Path(recipe.output)
        self._rollouts = Journal(self.output / "rollouts.jsonl", part - 1)
        self._verdicts = Journal(self.output / "verdicts.jsonl", part - 1)
        self._judge = None if recipe.judge is None else build_judge(recipe.judge)
        self.answerer = self._answerer()
        self._identity = self.answerer.identity()

    def _answerer(self) -> Answerer:
        rollouts, hf, vllm = self.recipe.rollouts, self.recipe.hf, self.recipe.vllm
        decoding = Decoding(rollouts.max_new_tokens, rollouts.temperature)
        if rollouts.engine == "hf":
            engine = TransformersEngine(partial(load_any, hf.model, hf.device, hf.dtype))
            return LocalAnswerer(engine, hf.model, hf.dtype, decoding, rollouts.seed, hf.batch_size)
        if rollouts.engine == "vllm":
            if self._vllm is None:
                raise ConfigError("rollouts.engine: vllm needs its maker, see `Curation`; `future-l1 curate` gives it")
            engine = self._vllm(vllm.model, vllm.args, vllm.dtype)
            return LocalAnswerer(engine, vllm.model, vllm.dtype, decoding, rollouts.seed)
        return EndpointAnswerer(self.recipe.endpoint_settings(), rollouts.seed)

    def attempts(self, records: Sequence[TwiffRecord]) -> Iterator[tuple[TwiffRecord, str, Attempt]]:
        """(record, condition, attempt) of every answer that these records need."""
        rollouts = self.recipe.rollouts
        for record in records:
            # By relative path and size, not by place: machines keep their videos where they like.
            video = [_relative(record.video, self.recipe.data.videos), Path(record.video).stat().st_size]
            for condition in CONDITIONS:
                prompt = self._prompt(record, condition == VISUAL)
                shown = [prompt.question, prompt.media, prompt.frames.numbers, video]
                drawn = [rollouts.temperature, rollouts.max_new_tokens, rollouts.seed]
                for sample in range(rollouts.n):
                    yield record, condition, Attempt(key_of(self._identity, shown, drawn, sample), prompt, sample)

    def _prompt(self, record: TwiffRecord, future: bool) -> RlPrompt:
        prompt = twiff_prompt(record, self.recipe.data.question_media, future)
        if "<answer>" in prompt.question:  # the question says so itself
            return prompt
        return replace(prompt, question=prompt.question + self.recipe.rollouts.instruction)

    def mine(self) -> list[TwiffRecord]:
        """The records of this shard."""
        part, parts = self.shard
        return [record for record in self.records if stable_hash(record.id) % parts == part - 1]

    def run(self) -> None:
        """Make the answers and verdicts of this shard that are not there yet.

        Raises:
            EndpointError: the endpoint is gone, or refuses everyone. DataError: the disk is full, or answers or
            verdicts are missing at the end. What is finished is kept, and the next run goes on from there.
        """
        save_recipe(self.recipe, self.output / "recipe.yaml")
        attempts = [attempt for _, _, attempt in self.attempts(self.mine())]
        stored = {row["key"] for row in self._rollouts}
        bar = tqdm(
            total=len(attempts),
            initial=sum(attempt.key in stored for attempt in attempts),
            desc="rollouts",
            unit="answer",
            disable=None if self._progress else True,
        )

        def store(answers: list[tuple[Attempt, str]]) -> None:
            self._rollouts.append(
                {
                    "key": attempt.key,
                    "id": attempt.prompt.id,
                    "pool": attempt.prompt.frames.numbers,
                    "sample": attempt.sample,
                    "answer": answer,
                }
                for attempt, answer in answers
            )
            stored.update(attempt.key for attempt, _ in answers)
            bar.update(len(answers))

        with bar:
            failed = self.answerer.run(attempts, lambda attempt: attempt.key in stored, store)
        if failed:
            raise DataError(
                f"{self.output}: {len(failed):,} of {len(attempts):,} answers are missing, the rest is kept. The "
                f"first: {failed[0]} Run the same command again."
            )
        if self._judge is not None:
            self._ask_judge()

    def _ask_judge(self) -> None:
        """Verdicts on this shard's answers that no rule decides."""
        known = {row["key"] for row in self._verdicts}
        wanted: dict[str, JudgeItem] = {}
        for record, _, attempt, answer in self._answers(self.mine()):
            key = self._verdict_key(record, attempt, answer)
            if key not in known and _by_rule(attempt.prompt, answer) is None:
                question = attempt.prompt.question
                wanted[key] = JudgeItem(question, record.answer, extract_answer(answer) or "", record.id)
        bar = tqdm(total=len(wanted), desc="verdicts", unit="answer", disable=None if self._progress else True)
        missing: list[str] = []

        async def ask(key: str, item: JudgeItem) -> None:
            try:
                verdict = await self._judge.judge(*item)
            except JudgeUnavailable as error:
                missing.append(str(error))
            else:
                self._verdicts.append([{"key": key, "id": item.sample_id, "correct": verdict}])
                bar.update()

        async def ask_all() -> None:
            await each(wanted.items(), lambda pair: ask(*pair), 2 * self._judge.settings.max_concurrency)

        with bar:
            asyncio.run(ask_all())
        if missing:
            raise DataError(
                f"{self.output}: the judge gave no verdict on {len(missing):,} of {len(wanted):,} answers, the rest is "
                f"kept. The first: {missing[0]} Run the same command again."
            )

    def _verdict_key(self, record: TwiffRecord, attempt: Attempt, answer: str) -> str:
        judge = self._judge.settings
        return key_of(judge.model, judge.prompt, attempt.prompt.question, record.answer, extract_answer(answer))

    def _answers(self, records: Sequence[TwiffRecord]) -> Iterator[tuple[TwiffRecord, str, Attempt, str]]:
        """(record, condition, attempt, answer) of every answer to these records. Raises DataError if one is missing."""
        # Two records that ask the same of the same frames have their answers in common.
        wanted: dict[str, list[tuple[TwiffRecord, str, Attempt]]] = {}
        for record, condition, attempt in self.attempts(records):
            wanted.setdefault(attempt.key, []).append((record, condition, attempt))
        total = len(wanted)
        for row in self._rollouts:
            for record, condition, attempt in wanted.pop(row["key"], ()):
                yield record, condition, attempt, row["answer"]
        if wanted:
            record = next(iter(wanted.values()))[0][0]
            raise DataError(
                f"{self.output}: {len(wanted):,} of {total:,} answers are missing, the first for record {record.id}. "
                "Finish every shard with this recipe (the same command without --select), and bring its "
                "rollouts*.jsonl here."
            )

    def scores(self) -> tuple[list[Score], int]:
        """(a score for each record of all shards, in order; how many answers nobody decided, which count as wrong).

        Raises DataError if an answer or a verdict is missing.
        """
        right = {record.id: Counter() for record in self.records}
        verdicts = {row["key"]: row["correct"] for row in self._verdicts}
        undecided = 0
        for record, condition, attempt, answer in self._answers(self.records):
            correct = _by_rule(attempt.prompt, answer)
            if correct is None and self._judge is not None:
                key = self._verdict_key(record, attempt, answer)
                if key not in verdicts:
                    raise DataError(
                        f"{self.output}: the judge's verdict on an answer to record {record.id} is missing. Finish "
                        "every shard with this recipe, and bring its verdicts*.jsonl here."
                    )
                correct = verdicts[key]
            elif correct is None:
                undecided += 1
            right[record.id][condition] += int((correct or 0.0) >= 0.5)
        scores = [Score(record, right[record.id][TEXT], right[record.id][VISUAL]) for record in self.records]
        return scores, undecided


def _by_rule(prompt: RlPrompt, answer: str) -> float | None:
    return accuracy(answer, prompt.ground_truth, prompt.options, prompt.kind)


def _relative(video: str, root: str) -> str:
    try:
        return Path(video).resolve().relative_to(Path(root).resolve()).as_posix() if root else Path(video).name
    except ValueError:  # an absolute path in the record
        return Path(video).name
