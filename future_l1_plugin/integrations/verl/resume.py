"""Resuming: only under the settings that the run was started with, on its data, and without losing its metrics.

verl goes on from the newest checkpoint in `trainer.default_local_dir`, whatever wrote it. Two recipes with one folder
would then be mixed into one run. What may change is said in `future_l1_plugin.resume.table`.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from future_l1_plugin.data.prompt import RlPrompt
from future_l1_plugin.data.sources import data_files
from future_l1_plugin.resume import Inputs, hold

_WAY_OUT = (
    "Or name another folder (trainer.project_name), train anew with trainer.resume_mode=disable, or start another run "
    "from a checkpoint of this one: trainer.resume_mode=resume_path and a trainer.project_name of its own."
)


def check_same_run(config: DictConfig, prompts: Sequence[RlPrompt] | None = None) -> None:
    """Compare with the settings and inputs left in the folder by the run's start, or leave them there.

    Args:
        prompts: those that are trained on, in the files' order; None: inputs are not compared.

    Raises:
        ConfigError: the folder holds a checkpoint of other settings; lists the first keys that differ.
        DataError: training files, media or the start checkpoint are not what they were.
    """
    trainer = config.trainer
    folder = Path(trainer.default_local_dir)
    # "resume_path": the user named a checkpoint. That is a start, not a resumption.
    going_on = trainer.resume_mode == "auto" and (folder / "latest_checkpointed_iteration.txt").exists()
    inputs = None if prompts is None else _inputs(config, prompts)
    for line in hold("verl", folder, going_on, _values(config), inputs, _WAY_OUT):
        print(line, flush=True)


def _values(config: DictConfig) -> dict[str, Any]:
    """The whole configuration, and how many ranks its machines make."""
    return OmegaConf.to_container(config, resolve=True) | {
        "ranks": config.trainer.n_gpus_per_node * config.trainer.nnodes
    }


def _inputs(config: DictConfig, prompts: Sequence[RlPrompt]) -> Inputs:
    files = config.data.train_files
    return Inputs.of(
        [path for file in ([files] if isinstance(files, str) else files) for path in data_files(file)],
        (prompt.id for prompt in prompts),
        config.actor_rollout_ref.model.path,
        {path for prompt in prompts for path in (prompt.video, *prompt.images) if path},
    )


def logged_before(config: DictConfig, step: int) -> bytes:
    """What verl's file logger wrote before a run that resumes at `step`: its lines up to there. b"" for a new run."""
    file = Path(config.trainer.project_name) / f"{config.trainer.experiment_name}.jsonl"
    if step == 0 or "file" not in config.trainer.logger or not file.is_file():
        return b""
    kept = []
    for line in file.read_bytes().splitlines(keepends=True):
        if line.endswith(b"\n") and json.loads(line)["step"] <= step:  # a killed run may leave half a line
            kept.append(line)
    return b"".join(kept)


def put_back(tracking: Any, before: bytes) -> None:
    """Write `before` in front of what verl's file logger has written since its start."""
    logger = tracking.logger.get("file")
    if logger is None or not before:
        return
    since = Path(logger.filepath).read_bytes()
    logger.fp.seek(0)
    logger.fp.truncate()
    logger.fp.write(before + since)
