"""Starting an SFT run, or going on with one: which checkpoint, under which settings, on which data."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import OmegaConf

from future_l1_plugin.config import load_recipe, save_recipe
from future_l1_plugin.errors import ConfigError
from future_l1_plugin.integrations.sft.recipe import SftRecipe
from future_l1_plugin.resume import Found, Inputs, check, delete, flat, newest_whole

if TYPE_CHECKING:
    from transformers import TrainingArguments

    from future_l1_plugin.data.record_files import Records
    from future_l1_plugin.data.records import TwiffRecord

_WAY_OUT = "Or name another output, or train anew with log.resume=false."
_LENGTH = ("epochs", "max_steps")


@dataclass
class Start:
    """How a run begins. Each process makes its own, from the same files.

    Attributes:
        newest: the checkpoint to go on from; None = from the beginning.
        finished: `final` is there, and the recipe asks for no more steps than it had.
        lines: what to say first.
    """

    recipe: SftRecipe
    newest: Path | None
    finished: bool
    lines: list[str]
    _found: Found
    _before: Inputs | None
    _settings: dict[str, Any]

    @classmethod
    def of(cls, recipe: SftRecipe, arguments: "TrainingArguments") -> "Start":
        """Raises ConfigError: the folder holds a run of other settings, or a finished one that nothing can prolong."""
        output = Path(recipe.output)
        final, settings = output / "final", _resolved(recipe, arguments)
        if not recipe.log.resume:
            return cls(recipe, None, False, [], Found(), None, settings)
        found = newest_whole(output / "checkpoints")
        if not (found.newest or final.exists()):
            return cls(recipe, None, False, found.lines(), found, None, settings)
        before, lines, longer = Inputs.read(output), found.lines(), False
        if (output / "recipe.yaml").exists():
            old = load_recipe(output / "recipe.yaml", SftRecipe)
            then, now = _flat(old), _flat(recipe)
            if before is not None:
                then, now = then | before.settings, now | settings
            lines += check("sft", then, now, f"{output} holds a run", _WAY_OUT)
            longer = any(getattr(old.train, key) != getattr(recipe.train, key) for key in _LENGTH)
        if final.exists() and longer and found.newest is None:
            raise ConfigError(
                f"{output} holds a finished run without a checkpoint (log.save_every was 0): it cannot get more steps. "
                f"Start another from it: model={final} and another output."
            )
        return cls(recipe, found.newest, final.exists() and not longer, lines, found, before, settings)

    def as_before(self, data: "Records") -> "Records | None":
        """Of all records in the files those that the run to go on with began with, in their order; None: it begins.

        So a limit that was raised, or a clip that broke since, moves no other record.
        """
        from future_l1_plugin.data.record_files import Records

        known = {record.id: record for record in data}
        ids = self._before.used["ids"] if self.newest is not None and self._before is not None else None
        if ids is None or not known.keys() >= set(ids):  # else the files differ: `take_inputs` says so
            return None
        return Records([known[id] for id in ids], data.bad)

    def take_inputs(self, data: Iterable["TwiffRecord"]) -> Inputs:
        """Digests of what the run depends on.

        Args:
            data: the records that are trained on, in order.

        Raises:
            DataError: they differ from those that the run to go on with was started on.
        """
        from future_l1_plugin.data.sources import data_files

        data, recipe = list(data), self.recipe
        inputs = Inputs.of(
            data_files(recipe.data.records),
            (record.id for record in data),
            recipe.model,
            {record.video for record in data},
            self._settings,
        )
        if self.newest is not None:
            if self._before is not None:
                self.lines += inputs.check(self._before, recipe.output, _WAY_OUT)
            else:
                self.lines.append(f"{recipe.output}: its start left no inputs.json, its data cannot be compared")
        return inputs

    def open_folder(self, inputs: Inputs) -> None:
        """One process: leave recipe and inputs there, and put out of the way what the run will write."""
        output = Path(self.recipe.output)
        if not self.recipe.log.resume:  # what an earlier run left would be taken for this one's by the next resume
            for folder in (*(output / "checkpoints").glob("checkpoint-*"), output / "checkpoints", output / "final"):
                delete(folder)
        elif self.newest is not None:
            for folder in self._found.broken:
                delete(folder)
        if (output / "final").exists():  # of the run before it was prolonged
            before = output / f"final-{self._found.step}"
            delete(before)
            (output / "final").rename(before)
            self.lines.append(f"the run gets more steps: its final checkpoint is kept as {before}")
        save_recipe(self.recipe, output / "recipe.yaml")
        inputs.write(output)


def _flat(recipe: SftRecipe) -> dict[str, Any]:
    return flat(OmegaConf.to_container(OmegaConf.structured(recipe)))


def _resolved(recipe: SftRecipe, arguments: "TrainingArguments") -> dict[str, Any]:
    """What the recipe leaves to the machine."""
    settings: dict[str, Any] = {"train.precision": "bf16" if arguments.bf16 else "fp32"}
    key = "processes" if recipe.deepspeed else "devices"
    return settings | {key: arguments.world_size}
