"""Records that fail in the middle of a run, under `data.on_bad: skip`: each is named once, all are counted, too many
end the run. That another record stood in for each of them is `data.sft.SftDataset`'s doing.
"""

import sys
from collections.abc import Iterable
from typing import Any

from transformers import TrainerCallback

from future_l1_plugin.data.record_files import BadRecord
from future_l1_plugin.data.sft import RecordFailed, too_many_failed

_NAME = "FailedRecords"  # in the state of a checkpoint


class FailedRecords(TrainerCallback):
    """Counts the records that failed since the run's start, over all processes and however often it went on.

    Each process looks at its own in every pass, all look together when a step is logged or saved.

    Args:
        most: so many may fail (`data.max_failed`).

    Attributes:
        reasons: id of a record -> why it failed.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.reasons: dict[str, str] = {}

    def note(self, failed: Iterable[tuple[str, str]]) -> None:
        """What the collator put into a batch: (id, reason) of each. Raises RecordFailed: they are too many."""
        for id, reason in failed:
            if id not in self.reasons:
                self.reasons[id] = reason
                print(f"left out, and the next record trained on instead: {reason}", file=sys.stderr, flush=True)
                self._check()

    def _check(self) -> None:
        if len(self.reasons) > self.most:
            bad = [BadRecord("record", id, reason) for id, reason in self.reasons.items()]
            raise RecordFailed(too_many_failed(bad, self.most))

    def _together(self) -> None:
        from accelerate.utils import gather_object

        for found in gather_object([self.reasons]):  # the same in every process, and in the same order
            self.reasons = self.reasons | found
        self.reasons = dict(sorted(self.reasons.items()))
        self._check()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        saved = (state.stateful_callbacks or {}).get(_NAME)
        if saved:
            self.reasons = dict(saved["attributes"]["reasons"])

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if control.should_log or control.should_save:
            self._together()
            state.stateful_callbacks[_NAME] = {"args": {}, "attributes": {"reasons": self.reasons}}

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._together()
        if self.reasons and state.is_world_process_zero:
            print(f"{len(self.reasons)} records failed in this run: {', '.join(self.reasons)}", file=sys.stderr)
