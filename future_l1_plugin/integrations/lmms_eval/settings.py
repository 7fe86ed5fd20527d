"""Arguments and generation settings of the model `future_l1`, checked. No torch, no lmms-eval."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from future_l1_plugin.errors import ConfigError

#: lmms-eval puts this into every task that sets no stop string; a thought with an empty line would end there.
INJECTED_UNTIL = ["\n\n"]
#: Generation settings that some tasks carry for one family of models; they say nothing to others.
FOREIGN = ("image_aspect_ratio", "use_cache")
#: Model arguments that one engine alone knows, with the value that says nothing (lmms-eval always gives a batch size).
ENGINES = {
    "hf": {"device": None, "attn_implementation": None, "batch_size": 1},
    "vllm": {"vllm_args": None},
}
KNOWN = ("max_new_tokens", "temperature", "top_p", "top_k", "do_sample", "num_beams", "until")


@dataclass(frozen=True)
class Generation:
    """Generation settings of a request, resolved. temperature 0 = greedy; until = stop strings."""

    max_new_tokens: int = 2048
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    until: tuple[str, ...] = ()

    @classmethod
    def from_task(cls, given: dict[str, Any]) -> "Generation":
        """From a task's generation_kwargs, --gen_kwargs put over them.

        As in lmms-eval's own models, a temperature above 0 means sampling, whatever do_sample says; do_sample without
        a temperature means temperature 1. The stop string that lmms-eval injects (`INJECTED_UNTIL`) is dropped, and so
        cannot be asked for.

        Raises ConfigError on a setting that would be ignored.
        """
        given = {key: value for key, value in given.items() if key not in FOREIGN and value is not None}
        if unknown := sorted(set(given) - set(KNOWN)):
            raise ConfigError(
                f"generation settings {unknown}: future_l1 knows {', '.join(KNOWN)}. Take the others out of the task's "
                "generation_kwargs or of --gen_kwargs."
            )
        if given.get("num_beams", 1) != 1:
            raise ConfigError(f"num_beams={given['num_beams']}: latent decoding has no beam search; set it to 1")
        until = given.get("until", [])
        until = [until] if isinstance(until, str) else list(until)
        return cls(
            max_new_tokens=whole("max_new_tokens", given.get("max_new_tokens", cls.max_new_tokens)),
            temperature=float(given.get("temperature", 1.0 if given.get("do_sample") else 0.0)),
            top_p=float(given.get("top_p", cls.top_p)),
            top_k=whole("top_k", given.get("top_k", cls.top_k), least=0),
            until=() if until == INJECTED_UNTIL else tuple(until),
        )

    def cut(self, text: str) -> str:
        """`text` up to the first stop string."""
        ends = [position for stop in self.until if stop and (position := text.find(stop)) >= 0]
        return text[: min(ends)] if ends else text


def check_engine(engine: str, given: dict[str, Any]) -> None:
    """Raises ConfigError: no such engine, or an argument among `given` that only another one knows."""
    one_of("engine", engine, tuple(ENGINES))
    for other, names in ENGINES.items():
        wrong = [name for name, default in names.items() if str(given[name]) != str(default)]
        if other != engine and wrong:
            ways = {"hf": "", "vllm": ': vLLM has arguments of its own, vllm_args={"max_num_seqs": 64, ..}'}
            raise ConfigError(f"engine={engine} takes no {', '.join(wrong)}, which engine={other} does{ways[engine]}")


def whole(name: str, value: Any, least: int = 1) -> Any:
    """`value` as a whole number of at least `least`; None stays None."""
    if value is None:
        return None
    try:
        number = int(str(value))
    except ValueError:
        number = None
    if number is None or number < least:
        raise ConfigError(f"{name}: expected a whole number of at least {least}, found {value!r}")
    return number


def positive(name: str, value: Any) -> float | None:
    """`value` as a number above 0; None stays None."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
        raise ConfigError(f"{name}: expected a number above 0, found {value!r}")
    return float(value)


def flag(name: str, value: Any) -> bool | None:
    """`value` if it is True or False; None stays None."""
    if value is not None and not isinstance(value, bool):
        raise ConfigError(f"{name}: expected True or False, found {value!r}")
    return value


def one_of(name: str, value: str, allowed: Sequence[str]) -> str:
    """`value` if it is allowed."""
    if value not in allowed:
        raise ConfigError(f"{name}: expected one of {', '.join(allowed)}, found {value!r}")
    return value


def json_object(name: str, value: str | dict[str, Any] | None) -> dict[str, Any]:
    """A JSON object from the command line; None and "" are empty."""
    if isinstance(value, dict) or not value:
        return value or {}
    try:
        parsed = json.loads(value)
    except json.JSONDecodeError as error:
        raise ConfigError(f'{name}: expected JSON such as {{"key": 1}}, found {value!r} ({error})') from error
    if not isinstance(parsed, dict):
        raise ConfigError(f"{name}: expected a JSON object, found {value!r}")
    return parsed
