"""Which records teach most by their future frames: curation by visual gain (Future-L1, arXiv 2606.05769).

A base model answers each question n times as it stands, and n times with the reasoning frames shown as well. p_t and
p_v are the right answers among n. A record is worth latent supervision if the model fails without the frames and
succeeds with them:

    keep p_t <= most_text and p_v - p_t >= least_gain, rank by the gain p_v - p_t, take the top N

Beside them stand a random N of all records, as a control, and records for RL (`Selection`).

Everything that costs is kept as it comes, in two journals of the output folder, and the rest is computed from them:

    rollouts.jsonl (rollouts.rank1.jsonl, .. of further shards)      answers of the model
    verdicts.jsonl (..)                                             what a judge says of answers that no rule decides

so a killed run goes on where it was, machines can share the work (`shard`), and another selection costs nothing.
"""

import asyncio
import json
import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from future_l1_plugin.config import from_mapping, save_recipe
from future_l1_plugin.data.prompt import RlPrompt, twiff_prompt
from future_l1_plugin.data.records import TwiffRecord, load_records
from future_l1_plugin.data.rollouts import Answerer, Attempt, EndpointAnswerer, LocalAnswerer, each, stable_hash
from future_l1_plugin.data.sft import assistant_content, check_records
from future_l1_plugin.endpoint import EndpointSettings
from future_l1_plugin.errors import ConfigError, DataError
from future_l1_plugin.journal import Journal, atomic_write, json_line, key_of
from future_l1_plugin.latent.tokens import END, LATENT, START
from future_l1_plugin.model.engine import Decoding, Engine, TransformersEngine, load_any
from future_l1_plugin.rewards.accuracy import accuracy
from future_l1_plugin.rewards.answer import extract_answer
from future_l1_plugin.rewards.format import format_reward
from future_l1_plugin.rewards.judge import JudgeItem, JudgeUnavailable, build_judge, judge_settings

TEXT, VISUAL = "text", "visual"
CONDITIONS = (TEXT, VISUAL)
ENGINES = ("hf", "vllm", "endpoint")


# ---- recipe ---------------------------------------------------------------------------------------------------------


@dataclass
class CurationData:
    """The records to choose from, and how a question is shown."""

    records: str = "???"
    videos: str = ""
    on_bad: str = "raise"
    question_media: str = "images"


@dataclass
class RolloutRecipe:
    """What the base model is asked."""

    engine: str = "hf"  # hf | vllm | endpoint
    n: int = 8  # answers to a question, with and without the future frames
    temperature: float = 1.0
    max_new_tokens: int = 512
    seed: int = 0
    instruction: str = "\nThink, then put only the final answer within <answer></answer>."


@dataclass
class HfRecipe:
    """engine hf: the base model in this process."""

    model: str = ""  # folder or hub id
    batch_size: int = 64  # answers decoded together
    device: str | None = None
    dtype: str = "auto"


@dataclass
class VllmRecipe:
    """engine vllm: the base model in vLLM, on this machine."""

    model: str = ""  # folder or hub id
    dtype: str = "auto"
    args: dict[str, Any] = field(default_factory=dict)  # of vLLM


@dataclass
class Selection:
    """Which records are taken.

    `sft.jsonl`: the top `size` by gain. `random.jsonl`: as many, drawn from all records alike. `rl_K.jsonl` for K of
    `rl_sizes`: K records that are not in `sft.jsonl` and whose reasoning has the format that RL rewards, in random
    order; a smaller file is the beginning of a larger one.
    """

    most_text: int = 6
    least_gain: int = 2
    size: int = 50_000
    rl_sizes: list[int] = field(default_factory=lambda: [5_000, 10_000, 20_000])
    seed: int = 0


@dataclass
class CurationRecipe:
    """A whole curation. `endpoint`: keys of EndpointSettings; `judge`: of JudgeSettings, null = the rule alone."""

    output: str = "???"
    data: CurationData = field(default_factory=CurationData)
    rollouts: RolloutRecipe = field(default_factory=RolloutRecipe)
    hf: HfRecipe = field(default_factory=HfRecipe)
    vllm: VllmRecipe = field(default_factory=VllmRecipe)
    endpoint: dict[str, Any] | None = None
    judge: dict[str, Any] | None = None
    select: Selection = field(default_factory=Selection)

    def __post_init__(self) -> None:
        rollouts, select = self.rollouts, self.select
        for key, value, allowed in (
            ("data.on_bad", self.data.on_bad, ("raise", "skip")),
            ("data.question_media", self.data.question_media, ("images", "video")),
            ("rollouts.engine", rollouts.engine, ENGINES),
        ):
            if value not in allowed:
                raise ConfigError(f"{key}: expected one of {', '.join(allowed)}, found {value!r}")
        least = [("rollouts.n", rollouts.n, 1), ("rollouts.max_new_tokens", rollouts.max_new_tokens, 1)]
        least += [("hf.batch_size", self.hf.batch_size, 1), ("select.size", select.size, 1)]
        least += [("select.most_text", select.most_text, 0), ("select.least_gain", select.least_gain, 1)]
        least += [("select.rl_sizes", size, 1) for size in select.rl_sizes]
        for key, value, smallest in least:
            if value < smallest:
                raise ConfigError(f"{key}: expected at least {smallest}, found {value}")
        if rollouts.temperature <= 0:
            raise ConfigError(
                f"rollouts.temperature: expected a number above 0 (greedy answers are all alike), found "
                f"{rollouts.temperature}"
            )
        for engine, given in (("hf", self.hf), ("vllm", self.vllm)):
            if rollouts.engine == engine and not given.model:
                raise ConfigError(
                    f"{engine}.model must be given for rollouts.engine {engine}: the checkpoint that answers"
                )
        if rollouts.engine == "endpoint":
            self.endpoint_settings()
        if self.judge is not None:
            judge_settings(self.judge)

    def endpoint_settings(self) -> EndpointSettings:
        """`endpoint`, checked, with the sampling of `rollouts`. Raises ConfigError."""
        if self.endpoint is None:
            raise ConfigError("endpoint must be given for rollouts.engine endpoint: base_url, model, ..")
        for key, ours in (("temperature", "temperature"), ("max_tokens", "max_new_tokens")):
            if key in self.endpoint:
                raise ConfigError(f"endpoint.{key}: set rollouts.{ours} instead")
        settings = from_mapping(EndpointSettings, self.endpoint, "endpoint")
        return replace(settings, temperature=self.rollouts.temperature, max_tokens=self.rollouts.max_new_tokens)


# ---- rollouts and verdicts ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Score:
    """How often the base model is right, of n, without and with the reasoning frames."""

    record: TwiffRecord
    text: int
    visual: int

    @property
    def gain(self) -> int:
        return self.visual - self.text


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
                shown = [prompt.question, prompt.media, prompt.pool, video]
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
                    "pool": attempt.prompt.pool,
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


# ---- selection ------------------------------------------------------------------------------------------------------


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
