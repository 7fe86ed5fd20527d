"""EasyR1 goes on from the newest checkpoint in `trainer.save_checkpoint_path`: only under the settings and on the data
that the run was started with. What may change is said in `future_l1_plugin.resume.table`.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from verl.utils.checkpoint import CHECKPOINT_TRACKER

from future_l1_plugin.data.prompt import RlPrompt
from future_l1_plugin.data.sources import data_files
from future_l1_plugin.integrations.easyr1.checkpoints import NAME
from future_l1_plugin.resume import Inputs, hold, newest_whole

if TYPE_CHECKING:
    from future_l1_plugin.integrations.easyr1.config import LaDapoConfig

_WAY_OUT = (
    "Or name another folder (trainer.save_checkpoint_path), which starts anew, or from a checkpoint of this run with "
    "trainer.load_checkpoint_path."
)


def check_same_run(config: "LaDapoConfig", prompts: Sequence[RlPrompt]) -> list[str]:
    """Compare with the settings and inputs left in the folder by the run's start, or leave them there.

    Args:
        config: the whole configuration, after `deep_post_init`.
        prompts: those that are trained on, in the files' order.

    Returns:
        Lines to print about what changed.

    Raises:
        ConfigError: the folder holds a checkpoint of other settings.
        DataError: training files, media or the start checkpoint are not what they were.
    """
    trainer, files = config.trainer, config.data.train_files
    folder = Path(trainer.save_checkpoint_path)
    # A checkpoint that the user named is a start, not a resumption.
    going_on = trainer.load_checkpoint_path is None and trainer.find_last_checkpoint
    there = (folder / CHECKPOINT_TRACKER).exists() or newest_whole(folder, NAME).newest is not None
    inputs = Inputs.of(
        [path for file in ([files] if isinstance(files, str) else files) for path in data_files(file)],
        (prompt.id for prompt in prompts),
        config.worker.actor.model.model_path,
        {path for prompt in prompts for path in (prompt.video, *prompt.images) if path},
    )
    values = config.to_dict() | {"ranks": trainer.n_gpus_per_node * trainer.nnodes}
    return hold("easyr1", folder, going_on and there, values, inputs, _WAY_OUT)
