"""The trainer class of this host."""

from transformers import Trainer

from future_l1_plugin.integrations.sft.trainer import LatentLosses


class LatentSftTrainer(LatentLosses, Trainer):
    """transformers.Trainer with the latent SFT objective."""
