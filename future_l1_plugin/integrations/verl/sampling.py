"""What a request to the rollout server may ask for: verl's sampling parameters and our own key `latent`, checked.

{"temperature": 1.0, "top_p": 1.0, "top_k": -1, "max_tokens": 256,
 "latent": {"policy": {"name": "vmf", "mean_cosine": 0.9},        # keys of `build_policy`
            "tempering": "sqrt_dim",                              # none | sqrt_dim | dim | number in (0, 1]
            "seed": 7,
            "wave": {"id": "step 3", "size": 64, "position": 0, "engine": 0}}}
"""

import hashlib
import json
import operator
from dataclasses import dataclass
from typing import Any

from future_l1_plugin.errors import ConfigError
from future_l1_plugin.la_dapo.tempering import Tempering
from future_l1_plugin.latent import build_policy

#: Sampling parameters that we do not implement, and the value at which they do nothing.
_NEUTRAL = {
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "min_p": 0.0,
    "min_tokens": 0,
    "n": 1,
    "ignore_eos": False,
}


@dataclass(frozen=True)
class Wave:
    """A request's place in its wave: `position` of `size`, 0-based. An absent one says that no request will take it.

    `engine` is the number of the engine that decodes the wave, or None where any may.
    """

    id: str
    size: int
    position: int
    engine: int | None = None
    absent: bool = False


@dataclass(frozen=True)
class Sampling:
    """How a request is decoded. Requests with equal settings may share a batch."""

    temperature: float  # 0 = greedy
    top_p: float
    top_k: int  # 0 = off
    max_tokens: int
    policy: str  # the keys of `build_policy`, as JSON
    tempering: str | float
    seed: int

    @classmethod
    def parse(cls, params: dict[str, Any], response_length: int) -> tuple["Sampling", Wave]:
        """Read and check the sampling parameters of a request.

        Args:
            response_length: `max_tokens` where none is given.

        Raises:
            ConfigError: a value out of range, an unknown key in `latent`, a parameter that would be ignored.
        """
        given = {key: value for key, value in params.items() if value is not None and key != "logprobs"}
        latent = given.pop("latent", None)
        if not isinstance(latent, dict):
            raise ConfigError(
                "sampling_params: expected a key `latent` with at least {policy: {name: ...}}, found none. Latent "
                "rollouts serve our own agent loop: set "
                "actor_rollout_ref.rollout.agent.default_agent_loop=future_l1_latent"
            )
        temperature = _number("temperature", given.pop("temperature", 1.0))
        top_p = _number("top_p", given.pop("top_p", 1.0))
        top_k = _whole("top_k", given.pop("top_k", -1), least=-1)
        max_tokens = _whole("max_tokens", given.pop("max_tokens", response_length), least=1)
        for key, value in given.items():
            if key not in _NEUTRAL or value != _NEUTRAL[key]:
                neutral = f"; leave it at {_NEUTRAL[key]}" if key in _NEUTRAL else ""
                raise ConfigError(f"sampling_params: latent rollouts have no {key}, found {value!r}{neutral}")
        if not 0 <= temperature < float("inf"):
            raise ConfigError(f"sampling_params.temperature: expected 0 (greedy) or more, found {temperature}")
        if not 0 < top_p <= 1:
            raise ConfigError(f"sampling_params.top_p: expected a number in (0, 1], found {top_p}")
        _known_keys("latent", latent, ("policy", "tempering", "seed", "wave"))
        policy = latent.get("policy")
        if not isinstance(policy, dict) or "name" not in policy:
            raise ConfigError(f"sampling_params.latent.policy: expected {{name: vmf, ...}}, found {policy!r}")
        build_policy(**policy)
        tempering = latent.get("tempering", "none")
        Tempering.from_name(tempering)
        settings = cls(
            temperature=temperature,
            top_p=top_p,
            top_k=max(top_k, 0),
            max_tokens=max_tokens,
            policy=json.dumps(policy, sort_keys=True),
            tempering=tempering,
            seed=_whole("latent.seed", latent.get("seed", 0)),
        )
        wave = latent.get("wave")
        if not isinstance(wave, dict):
            raise ConfigError(f"sampling_params.latent.wave: expected a request's place in its wave, found {wave!r}")
        wave = dict(wave)
        absent, engine = wave.pop("absent", False) is True, wave.pop("engine", None)
        _known_keys("latent.wave", wave, ("id", "size", "position"), required=True)
        size = _whole("latent.wave.size", wave["size"], least=1)
        position = _whole("latent.wave.position", wave["position"], least=0)
        if position >= size:
            raise ConfigError(f"sampling_params.latent.wave.position: expected less than size {size}, found {position}")
        return settings, Wave(str(wave["id"]), size, position, engine, absent)


def seed_of(seed: int, stream: str, index: int) -> int:
    """A seed of 63 bits for one of many random streams: the same in every process, unlike `hash`."""
    digest = hashlib.sha256(json.dumps([seed, stream, index]).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def _known_keys(where: str, found: dict[str, Any], keys: tuple[str, ...], required: bool = False) -> None:
    unknown = sorted(set(found) - set(keys))
    missing = sorted(set(keys) - set(found)) if required else []
    if unknown or missing:
        what = f"unknown key {unknown[0]!r}" if unknown else f"missing key {missing[0]!r}"
        raise ConfigError(f"sampling_params.{where}: {what}; expected {', '.join(keys)}")


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigError(f"sampling_params.{name}: expected a number, found {value!r}")
    return float(value)


def _whole(name: str, value: Any, least: int | None = None) -> int:
    try:
        number = operator.index(value)
    except TypeError as error:
        raise ConfigError(f"sampling_params.{name}: expected a whole number, found {value!r}") from error
    if least is not None and number < least:
        raise ConfigError(f"sampling_params.{name}: expected at least {least}, found {number}")
    return number
