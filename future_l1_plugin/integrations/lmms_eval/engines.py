"""Where the answers of the model `future_l1` come from: transformers in this process, or vLLM.

Both are given the same inputs and the same settings. Either loads its weights at the first answer.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property, partial
from typing import Any, Protocol

import torch
from lmms_eval.api.instance import Instance
from torch import Tensor

from future_l1_plugin.integrations.lmms_eval.settings import Generation
from future_l1_plugin.integrations.vllm.params import LatentParams
from future_l1_plugin.journal import key_of
from future_l1_plugin.latent import SpanBudget
from future_l1_plugin.model import LatentOutput, generate, load
from future_l1_plugin.model.batch import left_padded


@dataclass(frozen=True)
class Job:
    """One request: its place in the list, its key in the response log, its settings."""

    position: int
    key: str
    generation: Generation
    request: Instance

    @property
    def document(self) -> tuple[str, str, int]:
        """(task, split, doc_id)"""
        _, _, _, doc_id, task, split = self.request.args
        return task, split, doc_id


@dataclass(frozen=True)
class Answer:
    """text: special tokens kept. seconds: the answer's share of the time. kept: more fields for the response log."""

    text: str
    input_tokens: int
    output_tokens: int
    latent_tokens: int
    seconds: float
    kept: dict[str, Any] = field(default_factory=dict)


#: What the processor returned for a job, batch dimension 1; None if its images or videos are bad. Engines may call it
#: from several threads.
InputsOf = Callable[[Job], dict[str, Tensor] | None]


class Engine(Protocol):
    def answers(self, batches: Iterable[list[Job]], inputs_of: InputsOf) -> Iterator[list[tuple[Job, Answer]]]:
        """Answers as they come, to all jobs that have inputs. Jobs of a batch have equal settings."""

    def describe(self) -> dict[str, Any]:
        """What answers depend on beside model, prompts and decoding, as JSON."""

    def close(self) -> None:
        """Free the weights; the next answer loads them again."""


class HfAnswers:
    """Batch by batch.

    Args:
        checkpoint: arguments of `load`.
        decoding: jobs of a batch -> where their latents come from, as arguments of `generate`.
        kept: (output, row) -> `Answer.kept`.
    """

    def __init__(
        self,
        checkpoint: Mapping[str, Any],
        decoding: Callable[[list[Job]], dict[str, Any]],
        kept: Callable[[LatentOutput, int], dict[str, Any]],
    ) -> None:
        self._checkpoint, self._decoding, self._kept = checkpoint, decoding, kept

    @cached_property
    def model(self) -> Any:
        torch.set_flush_denormal(True)  # a small model is full of such numbers, on which a CPU is slow
        return load(**self._checkpoint)[0]

    def answers(self, batches: Iterable[list[Job]], inputs_of: InputsOf) -> Iterator[list[tuple[Job, Answer]]]:
        for batch in batches:
            found = [(job, inputs) for job in batch if (inputs := inputs_of(job)) is not None]
            if found:
                jobs, inputs = map(list, zip(*found, strict=True))
                yield list(zip(jobs, self._decode(jobs, inputs), strict=True))

    @torch.inference_mode()
    def _decode(self, jobs: list[Job], inputs: list[dict[str, Tensor]]) -> list[Answer]:
        model, generation = self.model, jobs[0].generation
        began = time.perf_counter()
        output = generate(
            model,
            left_padded(inputs, model.latent_tokenizer.pad_token_id, model.device),
            max_new_tokens=generation.max_new_tokens,
            temperature=generation.temperature,
            top_p=generation.top_p,
            top_k=generation.top_k,
            generator=torch.Generator(model.device).manual_seed(_seed(jobs)),
            **self._decoding(jobs),
        )
        seconds = (time.perf_counter() - began) / len(jobs)
        return [
            Answer(
                text=output.text[i],
                input_tokens=inputs[i]["input_ids"].shape[1],
                output_tokens=len(output.responses[i]),
                latent_tokens=len(output.latents[i]),
                seconds=seconds,
                kept=self._kept(output, i),
            )
            for i in range(len(jobs))
        ]

    def describe(self) -> dict[str, Any]:
        return {"name": "hf"}

    def close(self) -> None:
        self.__dict__.pop("model", None)


class VllmAnswers:
    """All jobs to vLLM, which makes batches of its own at each step. Seconds are a share of the time since the last
    answers, reading of videos included: it goes on beside decoding.

    Args:
        path, dtype: the checkpoint.
        policy: keys of `build_policy`.
        args: of vLLM.

    Raises:
        ConfigError, EnvironmentMismatch: an argument that vLLM does not have; no vLLM.
    """

    def __init__(
        self, path: str, dtype: str, budget: SpanBudget, policy: Mapping[str, Any], args: Mapping[str, Any]
    ) -> None:
        from future_l1_plugin.integrations.vllm.engine import check_args

        check_args(args)
        policy = {f"latent_{'policy' if name == 'name' else name}": value for name, value in policy.items()}
        latent = {**policy, "latent_limit": budget.limit, "latent_exact": int(budget.exact)}
        LatentParams.parse(latent)
        self._started_by = {"path": path, "args": args, "dtype": dtype, "latent": latent}

    @cached_property
    def _engine(self) -> Any:
        from future_l1_plugin.integrations.vllm.engine import VllmEngine

        return VllmEngine(**self._started_by)

    def answers(self, batches: Iterable[list[Job]], inputs_of: InputsOf) -> Iterator[list[tuple[Job, Answer]]]:
        engine = self._engine
        began = time.perf_counter()
        jobs = (job for batch in batches for job in batch)
        for answers in engine.answers(jobs, partial(self._asks, inputs_of)):
            seconds, began = (time.perf_counter() - began) / len(answers), time.perf_counter()
            yield [
                (job, Answer(answer.text, input_tokens, len(answer.ids), answer.latents, seconds))
                for (job, input_tokens), answer in answers
            ]

    @staticmethod
    def _asks(inputs_of: InputsOf, job: Job) -> list[Any]:
        """One question, or none if it cannot be shown. Called in threads."""
        from future_l1_plugin.integrations.vllm.engine import Ask, named

        task, split, doc_id = job.document
        with named(name := f"{task}, {split} {doc_id}"):
            inputs = inputs_of(job)
        if inputs is None:
            return []
        ids, given = inputs["input_ids"][0].tolist(), asdict(job.generation)
        sampling = {key: given[key] for key in ("temperature", "top_p", "top_k")}
        sampling["max_tokens"] = job.generation.max_new_tokens
        return [Ask((job, len(ids)), ids, inputs, _seed([job]), sampling, name)]

    def describe(self) -> dict[str, Any]:
        from future_l1_plugin.compat import require
        from future_l1_plugin.integrations.vllm.engine import answer_args

        return {"name": "vllm", "version": require("vllm"), "args": answer_args(self._started_by["args"])}

    def close(self) -> None:
        if engine := self.__dict__.pop("_engine", None):
            engine.close()


def _seed(jobs: list[Job]) -> int:
    return int(key_of([job.key for job in jobs])[:15], 16)
