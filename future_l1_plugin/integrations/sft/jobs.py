"""The runs that an SFT recipe stands for, and the command of each."""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from future_l1_plugin.config import load_recipe
from future_l1_plugin.errors import ConfigError
from future_l1_plugin.integrations.sft.nodes import Nodes
from future_l1_plugin.integrations.sft.recipe import SftRecipe

RUN = "future_l1_plugin.integrations.sft.run"
ONE = Nodes()


@dataclass(frozen=True)
class Job:
    """One run: its resolved recipe, and what says so on a command line."""

    recipe: SftRecipe
    file: str
    overrides: tuple[str, ...]
    name: str  # KEY=VALUE in a sweep, else empty

    def command(self, gpus: int | None, nodes: Nodes = ONE) -> list[str]:
        """The command of this run on this machine. gpus None: one process on it, on whatever device there is."""
        if gpus is None and nodes.address is None and not self.recipe.deepspeed:
            return [sys.executable, "-m", RUN, self.file, *self.overrides]
        return [sys.executable, *nodes.torchrun(gpus or 1), "-m", RUN, self.file, *self.overrides]


def jobs(file: str, overrides: Sequence[str] = ()) -> list[Job]:
    """The runs of a recipe, each checked whole.

    Raises:
        ConfigError: as `load_recipe`, for the recipe or for one of its sweep's values; `sweep.only` names none of them.
    """
    base = load_recipe(file, SftRecipe, overrides)
    sweep = base.sweep
    if sweep.key is None:
        return [Job(base, file, tuple(overrides), "")]
    wanted = sweep.values
    if sweep.only is not None:
        wanted = sweep.only if isinstance(sweep.only, list) else [sweep.only]
        if unknown := [value for value in wanted if value not in sweep.values]:
            raise ConfigError(f"{file}: sweep.only: expected one or more of {sweep.values}, found {unknown}")
    found = []
    for value in wanted:
        name = f"{sweep.key}={value}"
        point = [
            *overrides,
            f"{sweep.key}={json.dumps(value)}",
            f"output={base.output}/{name}",
            "sweep.key=null",
            "sweep.values=[]",
            "sweep.only=null",
        ]
        found.append(Job(load_recipe(file, SftRecipe, point), file, tuple(point), name))
    return found
