"""verl's checkpoints on the disk: which of them a run may go on from, and which of them may go.

verl removes old ones before the new one is whole, forgets at each start what it had saved, and goes on from whatever
`latest_checkpointed_iteration.txt` names. A run that is killed in a save may then have nothing to go on from. Here a
checkpoint is whole when it is sealed (`resume.seal`), which comes last, and old ones go when the new one is.

    default_local_dir/
      latest_checkpointed_iteration.txt   written anew at each start, from what is there
      earlier_runs.json                   steps of folders that were there when a run began anew: none of its own
      global_step_N/                      data.pt, actor/, whole.json
"""

import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, open_dict

from future_l1_plugin.errors import CheckpointError
from future_l1_plugin.journal import atomic_write
from future_l1_plugin.resume import MARKER, delete, fault, seal

TRACKER, EARLIER = "latest_checkpointed_iteration.txt", "earlier_runs.json"
_STEP = "global_step_"


class Checkpoints:
    """The checkpoints of one run.

    Args:
        folder: verl's `trainer.default_local_dir`.
        say: takes lines for the log.
    """

    def __init__(self, folder: str | os.PathLike, say: Callable[[str], Any]) -> None:
        self.folder, self.say = Path(folder), say
        self._passed_over: list[int] = []

    def path(self, step: int) -> Path:
        return self.folder / f"{_STEP}{step}"

    def steps(self) -> list[int]:
        """Of the run's own checkpoints, whole or not, in ascending order."""
        found = (re.fullmatch(rf"{_STEP}(\d+)", path.name) for path in self.folder.glob(f"{_STEP}*"))
        return sorted({int(match[1]) for match in found if match} - set(self._earlier()))

    def begin(self, step: int = 0) -> None:
        """A run begins anew, or from its own checkpoint that the user named: later ones there are none of its own."""
        there = {one for one in self.steps() if one > step} | set(self._earlier())
        if there:
            self._set_earlier(there)
        self._track(step if step in self.steps() else None)

    def settle(self) -> int | None:
        """The newest whole checkpoint's step, which verl's tracker file then names; None if there is none.

        What is passed over is said. One without a seal is whole if verl's tracker names it: verl writes that last.

        Raises CheckpointError: there is none, and one was whole once. Nobody killed that; somebody took files away.
        """
        self._passed_over, chosen, tracked = [], None, self._tracked()
        for step in reversed(self.steps()):
            reason = fault(self.path(step))
            if reason is None or (step == tracked and not (self.path(step) / MARKER).exists()):
                chosen = step
                break
            self._passed_over.append(step)
            self.say(f"passed over {self.path(step)}: {reason}")
        for step in self._passed_over if chosen is None else ():
            if (self.path(step) / MARKER).exists():
                raise CheckpointError(
                    f"{self.path(step)}: {fault(self.path(step))}, and no other checkpoint is whole. Put it back, or "
                    "train anew with trainer.resume_mode=disable"
                )
        if chosen is None and self._passed_over:
            self.say(f"no checkpoint in {self.folder} is whole: training starts from its beginning")
        self._track(chosen)
        return chosen

    def make_way(self, step: int) -> None:
        """Before a save: nothing of an earlier one under the same name may be taken for a part of it."""
        if self.path(step).exists():
            delete(self.path(step))
        if step in self._earlier():
            self._set_earlier(set(self._earlier()) - {step})

    def retain(self, step: int, keep: int | None) -> None:
        """After a save: it is sealed, and what is older than the newest `keep` goes. None or 0 = keep all.

        What `settle` passed over goes, too. Raises DataError: the disk is full.
        """
        seal(self.path(step))
        self._track(step)  # verl's own writing leaves an empty file if it is killed in it
        if not keep:
            return
        for left in {*self._passed_over} - {step}:
            delete(self.path(left))
        self._passed_over = []
        older = [one for one in self.steps() if one < step]
        for one in older[: max(0, len(older) - keep + 1)]:
            delete(self.path(one))

    def _tracked(self) -> int | None:
        file = self.folder / TRACKER
        text = file.read_text().strip() if file.is_file() else ""
        return int(text) if text.isdigit() else None  # empty, if verl was killed while it wrote

    def _track(self, step: int | None) -> None:
        if step is None:
            (self.folder / TRACKER).unlink(missing_ok=True)
        else:
            self._write(TRACKER, str(step))

    def _earlier(self) -> list[int]:
        file = self.folder / EARLIER
        return json.loads(file.read_text()) if file.is_file() else []

    def _set_earlier(self, steps: set[int]) -> None:
        self._write(EARLIER, json.dumps(sorted(steps)))

    def _write(self, name: str, text: str) -> None:
        with atomic_write(self.folder / name) as file:
            file.write(text.encode())


def kept(trainer: DictConfig) -> int | None:
    """How many checkpoints the section `trainer` asks for; None = all."""
    return 1 if trainer.get("remove_previous_ckpt_in_save", False) else trainer.get("max_actor_ckpt_to_keep", None)


@contextmanager
def nothing_removed(trainer: DictConfig) -> Iterator[None]:
    """verl, asked to save within this, removes no checkpoint."""
    off = {"remove_previous_ckpt_in_save": False, "max_actor_ckpt_to_keep": None}
    before = {key: trainer.get(key) for key in off}
    with open_dict(trainer):
        trainer.update(off)
    try:
        yield
    finally:
        with open_dict(trainer):
            trainer.update(before)
