"""Who a rollout depends on, asked while the trainer waits for it: a process that dies tells nobody.

verl hands prompts to its agent-loop workers and looks at TransferQueue until they come back. When a worker is killed
(Ray's memory monitor does it), no call fails, and nothing ever comes back.
"""

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import ActorUnavailableError, RayError

from future_l1_plugin.integrations.rl.groups import RolloutError

PING_S = 1.0
_SHOWN = 8  # prompts that a message names
_CAUSE = 600  # characters of Ray's own words
GO_ON = "The same command goes on from the newest checkpoint."
_MEMORY = (
    "If the machine was short of memory, lower actor_rollout_ref.rollout.agent.num_workers, reward.num_workers or "
    "data.future_l1.frame_cache_mb."
)


@dataclass(frozen=True)
class Asked:
    """A prompt under way: its id in the data, and the agent-loop worker that got it."""

    prompt_id: str
    worker: str


def agent_loop_worker(number: int) -> str:
    """What messages call it."""
    return f"agent-loop worker {number}"


class Watch:
    """Actors of a run that must stay alive.

    Args:
        actors: by the name that a message calls them by.
        asked: the prompts under way by uid, kept by the agent-loop manager.
    """

    def __init__(self, actors: Mapping[str, Any], asked: Mapping[str, Asked]) -> None:
        self._actors, self._asked = dict(actors), asked
        self._pings: dict[str, Any] = {}  # an answer that is waited for fails as soon as its actor dies
        self._next = 0.0

    def check(self, waited: Iterable[str]) -> None:
        """Costs a call an actor each `PING_S`, however often it is asked, and never waits for an answer.

        Args:
            waited: uids of the prompts that the trainer waits for.

        Raises:
            RolloutError: an actor is dead; with Ray's reason, and the prompts that are waited for.
        """
        if time.monotonic() < self._next:
            return
        self._next = time.monotonic() + PING_S
        for name, actor in self._actors.items():
            if name not in self._pings:
                self._pings[name] = actor.__ray_ready__.remote()
        answers = list(self._pings.values())
        back = set(ray.wait(answers, num_returns=len(answers), timeout=0)[0]) if answers else set()
        for name in [name for name, answer in self._pings.items() if answer in back]:
            try:
                ray.get(self._pings.pop(name))
            except ActorUnavailableError:  # Ray itself does not know yet; the next call tells
                continue
            except RayError as error:  # OutOfMemoryError is none of RayActorError's kind
                raise RolloutError(f"{name} died: {words(error)} {self.described(waited)} {_MEMORY} {GO_ON}") from error

    def described(self, waited: Iterable[str]) -> str:
        """The prompts by their ids in the data, each with its worker."""
        waited = sorted(waited)
        names = [f"{self._asked[uid].prompt_id} ({self._asked[uid].worker})" for uid in waited if uid in self._asked]
        names += [uid for uid in waited if uid not in self._asked]
        more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
        return f"{len(names)} prompts are waited for: {', '.join(names[:_SHOWN])}{more}."


def words(error: BaseException) -> str:
    """Ray's reason on one line."""
    text = " ".join(str(error).split())
    return text if len(text) <= _CAUSE else f"{text[:_CAUSE]} .."
