"""Prompts of `data/rl.py` as EasyR1's rows, and its data loaders over them.

A row carries token ids and paths, no pixels: the workers decode what a row shows when they need it.
"""

from typing import Any

import torch
from torch.utils.data import RandomSampler, SequentialSampler
from torchdata.stateful_dataloader import StatefulDataLoader
from verl.utils.dataset import collate_fn
from verl.utils.torch_functional import postprocess_data

from future_l1_plugin.data.prompt import EncodedPrompt
from future_l1_plugin.errors import ConfigError
from future_l1_plugin.integrations.easyr1.config import LatentDataConfig
from future_l1_plugin.integrations.verl.columns import PROMPT as ROW
from future_l1_plugin.integrations.verl.dataset import LatentRLDataset
from future_l1_plugin.model.backbone import GRID_KEYS, MEDIA_KEYS, by_processor
from future_l1_plugin.rewards import RewardSet

#: EasyR1's field for pictures and videos. It takes it along to rollout and actor; ours holds the prompt itself.
PROMPT = "multi_modal_data"


class EasyR1Dataset(LatentRLDataset):
    """Rows of EasyR1's fields input_ids, attention_mask Long (P,), position_ids Long (4, P), left-padded to
    `max_prompt_length`; `ground_truth`; `extra_info` as on verl; and the prompt itself under PROMPT.

    Raises as `LatentRLDataset`; DataError for a prompt of more than `max_prompt_length` tokens when it is asked for.
    """

    def __init__(self, files: Any, config: LatentDataConfig, processor: Any, rewards: RewardSet | None = None) -> None:
        settings = {"future_l1": vars(config.future_l1), "max_prompt_length": config.max_prompt_length}
        super().__init__(files, processor.tokenizer, settings, rewards=rewards)
        self.processor = processor
        self._positions = by_processor(processor).easyr1_positions.load()

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = super().__getitem__(index)
        prompt = {name: row[name] for name in (ROW, "rl_limits")}
        encoded = self.encode(prompt, self.processor)
        ids = torch.tensor(encoded.prompt_ids)
        mask = torch.ones_like(ids)
        inputs = encoded.inputs
        positions = self._positions(
            self.processor,
            input_ids=ids,
            attention_mask=mask,
            **{key: inputs.get(key) for key in GRID_KEYS},
        )  # (3, P)
        ids, mask, positions = postprocess_data(
            input_ids=ids,
            attention_mask=mask,
            position_ids=torch.cat([torch.arange(len(ids))[None], positions]),
            max_length=prompt["rl_limits"]["max_prompt_length"],
            pad_token_id=self.processor.tokenizer.pad_token_id,
        )
        return {
            "input_ids": ids,
            "attention_mask": mask,
            "position_ids": positions,
            "ground_truth": row["reward_model"]["ground_truth"],
            "extra_info": row["extra_info"],
            PROMPT: prompt,
        }


def media(encoded: EncodedPrompt) -> dict[str, torch.Tensor]:
    """What the model takes of a prompt beside its tokens."""
    return {name: encoded.inputs[name] for name in MEDIA_KEYS if name in encoded.inputs}


def create_dataloaders(
    config: LatentDataConfig, processor: Any, rewards: RewardSet | None = None
) -> tuple[StatefulDataLoader, StatefulDataLoader]:
    """For training, in an order of `data.seed`, and for validation; `rewards`: as in `LatentRLDataset`.

    Raises as `EasyR1Dataset`; ConfigError for fewer training prompts than a batch, which would train nothing.
    """
    train, val = (EasyR1Dataset(files, config, processor, rewards) for files in (config.train_files, config.val_files))
    generator = torch.Generator().manual_seed(config.seed)
    sampler = RandomSampler(train, generator=generator) if config.shuffle else SequentialSampler(train)
    shared = {"num_workers": config.num_workers, "collate_fn": collate_fn}
    batch_size = config.mini_rollout_batch_size or config.rollout_batch_size
    if len(train) < batch_size:
        key = "mini_rollout_batch_size" if config.mini_rollout_batch_size else "rollout_batch_size"
        raise ConfigError(
            f"data.{key}: expected at most the {len(train)} prompts of data.train_files, found {batch_size}. A round "
            "of sampling takes so many, none of them twice. Lower it (and worker.actor.global_batch_size), set "
            f"data.mini_rollout_batch_size={len(train)}, or give more prompts"
        )
    val_size = len(val) if config.val_batch_size == -1 else config.val_batch_size
    return (
        StatefulDataLoader(train, batch_size=batch_size, sampler=sampler, drop_last=True, **shared),
        StatefulDataLoader(val, batch_size=val_size, **shared),
    )
