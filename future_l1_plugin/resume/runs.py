"""The guard of an RL run's folder: settings and inputs are left there by the start, and compared when it goes on."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from future_l1_plugin.journal import atomic_write
from future_l1_plugin.resume.compare import check, flat
from future_l1_plugin.resume.inputs import Inputs

SETTINGS = "settings.yaml"


def hold(
    host: str, folder: Path, going_on: bool, values: Mapping[str, Any], inputs: Inputs | None, way_out: str
) -> list[str]:
    """Check a run that goes on against its start, which leaves its settings and inputs here.

    Args:
        host: `verl` or `easyr1`.
        folder: of the run's checkpoints.
        going_on: False for a start, which compares nothing.
        values: the resolved configuration, nested.
        inputs: None where nobody knows them.
        way_out: what can be done but setting things back, as a sentence.

    Returns:
        Lines to print about what changed.

    Raises:
        ConfigError: settings that may not change (`compare.check`).
        DataError: inputs that changed (`Inputs.check`).
    """
    file, mine, lines = folder / SETTINGS, flat(values), []
    folder.mkdir(parents=True, exist_ok=True)
    if going_on and file.is_file():
        before = flat(OmegaConf.to_container(OmegaConf.load(file)))
        lines = check(host, before, mine, f"{folder} holds checkpoints of a run", way_out)
    else:
        with atomic_write(file) as opened:
            opened.write(OmegaConf.to_yaml(OmegaConf.create(mine)).encode())
    if inputs is None:
        return lines
    before = Inputs.read(folder) if going_on else None
    if before is not None:
        return lines + inputs.check(before, folder, way_out)
    inputs.write(folder)
    if going_on:
        lines.append(f"{folder}: the run's start left no inputs.json, so that its data cannot be compared")
    return lines
