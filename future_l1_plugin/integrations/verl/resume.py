"""Resuming: only under the settings that the run was started with, and without losing its metrics.

verl goes on from the newest checkpoint in `trainer.default_local_dir`, whatever wrote it. Two recipes with one folder
would then be mixed into one run.
"""

import json
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from future_l1_plugin.errors import ConfigError

FILE = "settings.yaml"
#: What makes a run the run that it is. Its length, its logs and its machines may change.
_SECTIONS = ("latent", "rewards", "groups", "algorithm", "data", "actor_rollout_ref")
_FREE = (
    "data.dataloader_num_workers",
    "actor_rollout_ref.actor.optim.total_training_steps",
    "actor_rollout_ref.rollout.agent.num_workers",
    "actor_rollout_ref.rollout.custom",
    "actor_rollout_ref.rollout.val_kwargs",
    "data.val_files",
    "data.val_max_samples",
    "data.val_batch_size",
    "data.gen_batch_size",
    "data.future_l1.frame_cache_mb",
    # What a run that had reached them is advised to raise; steps that stayed within them are the same.
    "groups.max_failed",
    "groups.max_rounds",
)


def check_same_run(config: DictConfig) -> None:
    """Compare with the settings left in the folder by the run's start, or leave them there.

    Raises:
        ConfigError: the folder holds a checkpoint of other settings; lists the first keys that differ.
    """
    if config.trainer.resume_mode == "resume_path":  # the user named a checkpoint: that is a start, not a resumption
        return
    folder = Path(config.trainer.default_local_dir)
    file, mine = folder / FILE, _flat(config)
    if (
        config.trainer.resume_mode == "auto"
        and file.is_file()
        and (folder / "latest_checkpointed_iteration.txt").exists()
    ):
        theirs = OmegaConf.to_container(OmegaConf.load(file))
        changed = [key for key in sorted({*mine, *theirs}) if str(mine.get(key)) != str(theirs.get(key))]
        if changed:
            shown = "; ".join(f"{key}: {theirs.get(key)!r} -> {mine.get(key)!r}" for key in changed[:5])
            more = f" and {len(changed) - 5} more" if len(changed) > 5 else ""
            raise ConfigError(
                f"{folder} holds checkpoints of a run with other settings ({shown}{more}). Name another folder "
                "(trainer.project_name), or train anew with trainer.resume_mode=disable"
            )
    folder.mkdir(parents=True, exist_ok=True)
    file.write_text(OmegaConf.to_yaml(OmegaConf.create(mine)), encoding="utf-8")


def _flat(config: DictConfig) -> dict[str, Any]:
    """Dotted key -> value of the sections that count."""
    found: dict[str, Any] = {}

    def walk(prefix: str, value: Any) -> None:
        if any(prefix == key or prefix.startswith(f"{key}.") for key in _FREE):
            return
        if isinstance(value, dict) and value:
            for key, inner in value.items():
                walk(f"{prefix}.{key}", inner)
        else:
            found[prefix] = value

    for section in _SECTIONS:
        if section in config:
            walk(section, OmegaConf.to_container(config[section], resolve=True))
    return found


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
