"""A look at the configuration before verl starts Ray: Hydra calls it (`hydra.callbacks` of a recipe) before `main_ppo`.

verl asks a trainer for nothing before Ray is up, which takes a minute and hides an error among the workers' logs.
"""

import sys
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf, open_dict

from future_l1_plugin.errors import UserError
from future_l1_plugin.integrations.verl.settings import Settings


class CheckBeforeStart(Callback):
    """Ends the process with the message of what `Settings` refuses."""

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Raises SystemExit: Hydra turns any other exception of a callback into a warning."""
        config = OmegaConf.create(OmegaConf.to_container(config, resolve=False))
        with open_dict(config):
            config.pop("hydra", None)  # its own part, which verl does not get
        try:
            Settings.from_config(config)
        except UserError as error:
            sys.exit(f"future_l1_plugin: {error}")
