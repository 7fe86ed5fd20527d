"""What a request may ask for, in `SamplingParams.extra_args` (over HTTP: `vllm_xargs`, hence flat keys).

latent_policy       deterministic (default) | vmf | gaussian | one of an installed package
latent_KEY          KEY of the policy, as in `build_policy`: latent_mean_cosine, latent_sigma, ..
latent_seed         whole number, of the latents' noise (default 0); tokens have `SamplingParams.seed`
latent_limit        latents per span may hold, at least 0 (default: the checkpoint's rule)
latent_exact        1: the model cannot end a span before the limit (default: the checkpoint's rule)
latent_head         0: mu is the hidden state itself, whatever head the checkpoint has (default 1)
latent_return       latents (default) | means (also mu and log p(end), as a rollout needs) | none
                    Latents come with the finished response: stop strings lose them and are refused (with none they
                    are free), and in the chunks of a stream (`stream: true`) vLLM has no place for them.
latent_form         text (default: base64, which an HTTP response can hold) | bytes (for who calls the engine itself)
"""

from dataclasses import dataclass
from inspect import signature
from typing import Any

from future_l1_plugin.errors import ConfigError
from future_l1_plugin.latent.policy import build_policy, find_policy
from future_l1_plugin.latent.policy_base import Policy
from future_l1_plugin.latent.spans import SpanBudget

RETURNS = ("none", "latents", "means")
FORMS = ("text", "bytes")
#: The scheduler's own key: latents of a preempted request, on their way back to the worker.
REPLAY = "_latent_replay"
_KEYS = ("policy", "seed", "limit", "exact", "head", "return", "form")


@dataclass(frozen=True)
class LatentParams:
    """One request's settings. None = as the checkpoint says."""

    policy: tuple[tuple[str, Any], ...]  # keys and values of `build_policy`
    seed: int
    limit: int | None
    exact: bool | None
    head: bool
    returns: str  # one of RETURNS
    form: str  # one of FORMS

    @classmethod
    def parse(cls, extra_args: dict[str, Any] | None) -> "LatentParams":
        """Read the `latent_` keys; others belong to others.

        Raises:
            ConfigError: unknown key, value out of range.
        """
        args = extra_args or {}
        given = {key.removeprefix("latent_"): value for key, value in args.items() if key.startswith("latent_")}
        get = given.get
        name = get("policy", "deterministic")
        own = [key for key in signature(find_policy(name)).parameters if key not in _KEYS]
        if unknown := sorted(set(given) - {*_KEYS, *own}):
            valid = ", ".join(f"latent_{key}" for key in (*_KEYS, *own))
            raise ConfigError(f"extra_args: unknown key 'latent_{unknown[0]}'; valid keys with policy {name}: {valid}")
        policy = {"name": name} | {key: get(key) for key in own if get(key) is not None}
        build_policy(**policy)
        returns, form = get("return", "latents"), get("form", "text")
        for key, value, known in (("return", returns, RETURNS), ("form", form, FORMS)):
            if value not in known:
                raise ConfigError(f"extra_args.latent_{key}: expected one of {', '.join(known)}, found {value!r}")
        return cls(
            policy=tuple(sorted(policy.items())),
            seed=_whole("seed", get("seed", 0), -(2**63), 2**63),
            limit=None if get("limit") is None else _whole("limit", get("limit"), 0, 2**31),
            exact=None if get("exact") is None else bool(_whole("exact", get("exact"), 0, 2)),
            head=bool(_whole("head", get("head", 1), 0, 2)),
            returns=returns,
            form=form,
        )

    def build_policy(self) -> Policy:
        return build_policy(**dict(self.policy))

    def budget(self, default: SpanBudget) -> SpanBudget:
        """`default`, the checkpoint's rule, with what the request set in its place."""
        return SpanBudget(
            limit=default.limit if self.limit is None else self.limit,
            exact=default.exact if self.exact is None else self.exact,
        )


def _whole(name: str, value: Any, low: int, high: int) -> int:
    if not isinstance(value, int) or not low <= value < high:
        raise ConfigError(f"extra_args.latent_{name}: expected a whole number in [{low}, {high}), found {value!r}")
    return int(value)
