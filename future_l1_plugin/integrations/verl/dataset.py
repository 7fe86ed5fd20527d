"""verl's dataset: the prompts of `data/rl.py` as rows that travel through verl's transport.

    data:
      train_files: [world/sft.json]           # schema by file: TwiFF, FutureBench or plain
      val_files: [world/futurebench.json]
      max_prompt_length: 512
      custom_cls: {path: pkg://future_l1_plugin.integrations.verl.dataset, name: LatentRLDataset}
      future_l1:
        video_root: world/videos              # or a mapping from file to folder
        question_media: video

A row carries text and paths, no pixels. The agent loop, in another process, turns it into token ids and pixels with
`LatentRLDataset.encode(row, processor)`, which needs nothing but the row. verl itself is not imported here.
"""

import functools
import logging
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError
from torch.utils.data import Dataset

from future_l1_plugin.config import from_mapping
from future_l1_plugin.data.frame_cache import FrameCache
from future_l1_plugin.data.frames import VideoFrames
from future_l1_plugin.data.lengths import check_lengths, too_long
from future_l1_plugin.data.prompt import EncodedPrompt, RlPrompt, chat_messages, encode_prompt
from future_l1_plugin.data.rl import load_prompts
from future_l1_plugin.errors import ConfigError, DataError
from future_l1_plugin.integrations.rl.prompts import check_judged
from future_l1_plugin.integrations.rl.settings import checked_rewards
from future_l1_plugin.integrations.verl.columns import PROMPT
from future_l1_plugin.integrations.verl.unread import check_dataset_keys
from future_l1_plugin.rewards import RewardSet

AGENT_NAME = "future_l1_latent"
SECTION = "data.future_l1"
_SHOWN = 10  # rows left out that are logged one by one
_SHORTER = (
    "Raise it (and rollout.max_model_len), or leave such prompts out (data.future_l1.on_bad=skip); a new run may also "
    "lower data.future_l1.num_frames or show smaller pictures."
)

logger = logging.getLogger(__name__)


@dataclass
class PromptSettings:
    """The keys of `data.future_l1`; the first four as in `load_prompts`, for training and validation files alike."""

    video_root: Any = None  # text, a mapping from file to folder, or null = as in `load_prompts`
    question_media: str = "images"  # images | video: how question frames of TwiFF rows are shown
    num_frames: int = 32  # of a FutureBench clip
    on_bad: str = "raise"  # raise | skip
    frame_cache_mb: int = 256  # decoded frames kept in memory by each process that encodes prompts, in MiB

    def __post_init__(self) -> None:
        root = self.video_root
        if isinstance(root, Mapping):
            if wrong := [key for key, value in root.items() if not isinstance(value, str)]:
                raise ConfigError(f"video_root.{wrong[0]}: expected a folder, found {root[wrong[0]]!r}")
        elif root is not None and not isinstance(root, str):
            raise ConfigError(f"video_root: expected a folder, or a mapping from file to folder, found {root!r}")
        if self.question_media not in ("images", "video"):
            raise ConfigError(f"question_media: expected images or video, found {self.question_media!r}")
        if self.on_bad not in ("raise", "skip"):
            raise ConfigError(f"on_bad: expected raise or skip, found {self.on_bad!r}")
        if self.num_frames < 1:
            raise ConfigError(f"num_frames: expected at least 1, found {self.num_frames}")
        if self.frame_cache_mb < 0:
            raise ConfigError(f"frame_cache_mb: expected 0 (keep nothing) or more, found {self.frame_cache_mb}")


def prompt_settings(data_config: Mapping[str, Any]) -> PromptSettings:
    """The section `data.future_l1` of verl's `data` config, checked; the defaults if it is not there.

    Raises ConfigError: unknown keys (with the nearest), values of a wrong type or out of range.
    """
    section = data_config.get("future_l1")
    if section is None:
        return PromptSettings()
    # Resolved here: within the merge, `${data.seed}` would look for its value in the section alone.
    if isinstance(section, DictConfig):
        section = OmegaConf.to_container(section, resolve=True)
    if not isinstance(section, Mapping):
        raise ConfigError(f"{SECTION}: expected a section of keys and values, found {section!r}")
    return from_mapping(PromptSettings, section, SECTION)


class LatentRLDataset(Dataset):
    """Prompts for `data.custom_cls`. verl's sampler shuffles by `data.shuffle` and `data.seed`; this class does not.

    Args:
        data_files: one file or a list of files.
        tokenizer: as verl passes it; not used.
        processor: as verl passes it; tells how long prompts will be, and is not kept (the agent loop has its own).
        config: verl's `data` section.
        max_samples: use so many prompts: the first ones, or with `data.shuffle` ones drawn by `data.seed` (0 if that
            is null: a resumed run must draw the same). -1 = all.
        rewards: what the answers will be rewarded by; None = the section `rewards` beside verl's `data`, if `config` is
            part of a whole configuration. Without either nobody asks whether answers can be decided.

    A row (`dataset[i]`), all of it plain Python values:
        raw_prompt: messages (`chat_messages`); data_source: name for metrics;
        reward_model: {"style": "rule", "ground_truth"}, which verl itself asks for;
        extra_info: {"index": i, "id"}; index: i; agent_name: "future_l1_latent";
        rl_prompt: `RlPrompt.to_dict()`; rl_limits: {"max_prompt_length": int | None, "frame_cache_mb": int}.

    Raises:
        ConfigError: bad settings. DataError: files or rows that cannot be used, prompts of more than
            `data.max_prompt_length` tokens by what their files declare, free-text answers without a judge.
    """

    def __init__(
        self,
        data_files: str | Sequence[str],
        tokenizer: Any,
        config: Mapping[str, Any],
        processor: Any = None,
        max_samples: int = -1,
        rewards: RewardSet | None = None,
    ) -> None:
        settings = prompt_settings(config)
        check_dataset_keys(config)
        if not data_files:
            raise ConfigError("data.train_files and data.val_files: expected a file or a list of files, found nothing")
        files = [data_files] if isinstance(data_files, str) else [str(file) for file in data_files]
        prompts = load_prompts(
            files, settings.video_root, settings.question_media, settings.num_frames, settings.on_bad
        )
        rewards = _rewards_beside(config) if rewards is None else rewards
        if rewards is not None:
            prompts = check_judged(prompts, rewards, settings.on_bad)
        most = config.get("max_prompt_length")
        if most is not None and processor is not None:
            prompts = check_lengths(prompts, processor, most, settings.on_bad, _SHORTER)
        for bad in prompts.bad[:_SHOWN]:
            logger.warning("left out: %s (id %s): %s", bad.source, bad.id, bad.reason)
        if prompts.bad:
            total = len(prompts.bad) + len(prompts)
            again = "A run that goes on keeps the prompts it began with: to use them, fix them and start a new run"
            logger.warning("left out %d of %d prompts. %s", len(prompts.bad), total, again)
        self.prompts: list[RlPrompt] = _selected(prompts, max_samples, config)
        self._limits = {
            "max_prompt_length": most,
            "frame_cache_mb": settings.frame_cache_mb,
        }

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, index: int) -> dict[str, Any]:
        prompt = self.prompts[index]
        index = int(index) % len(self.prompts)
        return {
            "raw_prompt": chat_messages(prompt),
            "data_source": prompt.source,
            "reward_model": {"style": "rule", "ground_truth": prompt.ground_truth},
            "extra_info": {"index": index, "id": prompt.id},
            "index": index,
            "agent_name": AGENT_NAME,
            PROMPT: prompt.to_dict(),
            "rl_limits": dict(self._limits),
        }

    def resume_dataset_state(self) -> None:
        """Called by verl after it restores the loader. Nothing to do: prompts stay in pickled copies."""

    @classmethod
    def encode(cls, row: Mapping[str, Any], processor: Any) -> EncodedPrompt:
        """Token ids and pixels of a row, in any process and thread; reads the files that the row names.

        Decoded frames are kept for the process, up to `frame_cache_mb`. While there is a cache, clips are decoded one
        at a time, so that threads which ask for the same clip at once decode it once.

        Args:
            row: what `dataset[i]` returned; only rl_prompt and rl_limits are used.
            processor: Qwen3-VL's, with the chat template of a latent checkpoint.

        Raises:
            DataError: files that cannot be read; a prompt of more than `data.max_prompt_length` tokens.
        """
        prompt, limits = RlPrompt.from_dict(row[PROMPT]), row["rl_limits"]
        encoded = encode_prompt(prompt, processor, _frame_cache(limits["frame_cache_mb"]))
        most = limits["max_prompt_length"]
        if most is not None and len(encoded.prompt_ids) > most:
            raise DataError(f"prompt {prompt.id}: {too_long(len(encoded.prompt_ids), most, _SHORTER)}")
        return encoded


class _SharedCache(FrameCache):
    """A frame cache for several threads."""

    def __init__(self, max_bytes: int) -> None:
        super().__init__(max_bytes)
        self._lock = threading.Lock()

    def read(self, *args: Any, **kwargs: Any) -> VideoFrames:
        with self._lock:
            return super().read(*args, **kwargs)


@functools.cache
def _frame_cache(megabytes: int) -> _SharedCache | None:
    """The one cache of this process (training and validation rows carry the same size); None for size 0."""
    return _SharedCache(megabytes * 2**20) if megabytes else None


def _rewards_beside(config: Mapping[str, Any]) -> RewardSet | None:
    """verl hands a dataset its section alone; what stands beside it can be asked for, where it is part of a whole."""
    if not isinstance(config, DictConfig):
        return None
    try:
        entries = OmegaConf.select(config, "..rewards")
    except ConfigKeyError:  # part of nothing
        return None
    return None if entries is None else checked_rewards(OmegaConf.to_container(entries, resolve=True))


def _selected(prompts: list[RlPrompt], most: int, config: Mapping[str, Any]) -> list[RlPrompt]:
    if not 0 < most < len(prompts):
        return list(prompts)
    if not config.get("shuffle", False):
        return prompts[:most]
    drawn = np.random.default_rng(config.get("seed") or 0).choice(len(prompts), size=most, replace=False)
    return [prompts[i] for i in drawn]


def even_out(loader: Any) -> None:
    """Batches of about one size, as many as before: a last one of a single question would be lost with that question.

    loader: a data loader that has not begun.
    """
    batches = loader.batch_sampler
    batches.batch_size = -(-len(loader.dataset) // len(batches))
