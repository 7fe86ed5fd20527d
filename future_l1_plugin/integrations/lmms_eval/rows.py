"""Requests of lmms-eval and the rows of the response log that they become."""

from dataclasses import dataclass, field
from typing import Any

from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts

from future_l1_plugin.integrations.lmms_eval.settings import Generation
from future_l1_plugin.model.engine import Answer, Decoding


@dataclass(frozen=True)
class KeyedInstance:
    """One request of lmms-eval: its place in the list, its key in the response log, its settings."""

    position: int
    key: str
    generation: Generation
    request: Instance

    @property
    def document(self) -> tuple[str, str, int]:
        """(task, split, doc_id)"""
        _, _, _, doc_id, task, split = self.request.args
        return task, split, doc_id

    @property
    def decoding(self) -> Decoding:
        """All settings but the stop strings, which `row_of` applies."""
        settings = self.generation
        return Decoding(settings.max_new_tokens, settings.temperature, settings.top_p, settings.top_k)

    @property
    def name(self) -> str:
        task, split, doc_id = self.document
        return f"{task}, {split} {doc_id}"


def row_of(instance: KeyedInstance, answer: Answer) -> dict[str, Any]:
    """A row of the response log."""
    task, split, doc_id = instance.document
    return {
        "key": instance.key,
        "task": task,
        "split": split,
        "doc_id": doc_id,
        "text": instance.generation.cut(answer.text),
        "input_tokens": answer.prompt_tokens,
        "output_tokens": len(answer.ids),
        "latent_tokens": answer.latent_tokens,
        "seconds": round(answer.seconds, 6),
    }


@dataclass
class _Counts(TokenCounts):
    """lmms-eval's counts and the seconds that the sample took, for the logged samples."""

    seconds: float | None = field(default=None, compare=False)

    def to_dict(self) -> dict[str, Any]:
        return super().to_dict() | ({} if self.seconds is None else {"seconds": self.seconds})


def result_of(row: dict[str, Any]) -> GenerationResult:
    """A row of the response log as lmms-eval takes it. `seconds`: the sample's share of its batch's time in `generate`
    (the prompt's pass and decoding, not the reading of videos), or see `VllmEngine`; logs of earlier versions have
    none."""
    counts = _Counts(
        input_tokens=row["input_tokens"],
        output_tokens=row["output_tokens"],
        reasoning_tokens=row["latent_tokens"],
        seconds=row.get("seconds"),
    )
    return GenerationResult(text=row["text"], token_counts=counts)
