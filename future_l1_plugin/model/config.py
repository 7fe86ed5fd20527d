"""Latent settings: extra keys of an ordinary Qwen3-VL configuration, as in the released checkpoints."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from future_l1_plugin.errors import CheckpointError, ConfigError
from future_l1_plugin.latent.loss import LOSSES
from future_l1_plugin.latent.spans import SpanBudget
from future_l1_plugin.latent.tokens import LatentTokens
from future_l1_plugin.model.backbone import BACKBONES

HEADS = ("lvr", "swiglu")


@dataclass
class LatentConfig:
    """The latent keys of a checkpoint's `config.json`, under the names of the released checkpoints."""

    latent_id: int  # id of <|latent|>
    latent_start_id: int  # id of <|latent_start|>
    latent_end_id: int  # id of <|latent_end|>
    max_latent_token: int = 4  # latents a future frame is shown with in training, at most (paper: 4)
    train_fixed_latent_budget: int | None = None  # pool each future frame to exactly this many latents in training
    fixed_latent_budget: bool = False  # decode exactly max_latent_token latents per span
    loose_latent_budget: int | None = None  # decode at most this many latents per span
    infer_latent_multiplier: float = 2.0  # else at most round(max_latent_token * this)
    pool_after_proj: bool = True  # released key; carried along: targets are pooled after the vision merger
    latent_loss: str = "mse"  # mse | sum_mse | cosine
    latent_lambda: float = 0.1  # weight of the latent loss beside the cross-entropy
    use_projection_head: bool = False  # a head between hidden state and mu
    projection_hidden_dim: int = 2048  # inner width of the swiglu head
    projection_head_type: str = "swiglu"  # lvr | swiglu
    force_initial_latent_mode: bool = False  # the first response token is <|latent_start|> (RICE checkpoints)
    decoder_recon: dict[str, Any] = field(default_factory=dict)  # released decoder_recon_* keys, carried along

    def __post_init__(self) -> None:
        if self.max_latent_token < 1:
            raise ConfigError(f"max_latent_token: expected at least 1, found {self.max_latent_token}")
        if self.latent_loss not in LOSSES:
            raise ConfigError(f"latent_loss: expected one of {', '.join(LOSSES)}, found {self.latent_loss!r}")
        if self.use_projection_head and self.projection_head_type not in HEADS:
            raise ConfigError(
                f"projection_head_type: expected one of {', '.join(HEADS)}, found {self.projection_head_type!r}"
            )

    @classmethod
    def from_hf(cls, config: Any) -> "LatentConfig":
        """Read the keys of a transformers configuration. Raises CheckpointError if it has no latent tokens."""
        tokens = LatentTokens.from_config(config)
        given = {
            f.name: getattr(config, f.name)
            for f in fields(cls)
            if f.name != "decoder_recon" and getattr(config, f.name, None) is not None
        }
        opening = {name for family in BACKBONES.values() for name in family.opening}
        if opening & set(getattr(config, "architectures", None) or ()):
            given["force_initial_latent_mode"] = True
        given["fixed_latent_budget"] = bool(given.get("fixed_latent_budget", False))
        if not given.get("train_fixed_latent_budget"):  # released checkpoints write False or 0 for "off"
            given["train_fixed_latent_budget"] = None
        extra = {k: v for k, v in config.to_dict().items() if k.startswith("decoder_recon_")}
        given |= {"latent_id": tokens.latent, "latent_start_id": tokens.start, "latent_end_id": tokens.end}
        return cls(**given, decoder_recon=extra)

    def to_hf(self, config: Any) -> None:
        """Write the keys onto a transformers configuration, in place."""
        for f in fields(self):
            if f.name != "decoder_recon":
                setattr(config, f.name, getattr(self, f.name))
        for key, value in self.decoder_recon.items():
            setattr(config, key, value)

    @property
    def tokens(self) -> LatentTokens:
        return LatentTokens(self.latent_id, self.latent_start_id, self.latent_end_id)

    @property
    def budget(self) -> SpanBudget:
        """The budget rule for decoding."""
        return SpanBudget.from_config(self)

    @property
    def head(self) -> str:
        """'none', 'lvr' or 'swiglu'."""
        return self.projection_head_type if self.use_projection_head else "none"


def check_tokenizer(config: LatentConfig, tokenizer: Any, path: Any) -> None:
    """Raise CheckpointError if tokenizer and configuration disagree on a latent token's id."""
    found = LatentTokens.from_tokenizer(tokenizer)
    if found != config.tokens:
        raise CheckpointError(
            f"{path}: config.json says {config.tokens}, the tokenizer says {found}. "
            "The two files come from different checkpoints: copy the tokenizer files that belong to this config, "
            "or run `future-l1 convert` on the base again."
        )


def keys_from_words(settings: Sequence[str]) -> dict[str, Any]:
    """Read `KEY=VALUE` settings of LatentConfig; values are JSON or plain words.

    Raises:
        ConfigError: no `=`, or a key that LatentConfig does not have or that `convert` sets by itself.
    """
    own = {"latent_id", "latent_start_id", "latent_end_id", "max_latent_token", "decoder_recon"}
    known = [f.name for f in fields(LatentConfig) if f.name not in own]
    keys: dict[str, Any] = {}
    for setting in settings:
        key, sign, value = setting.partition("=")
        if not sign or key not in known:
            raise ConfigError(f"--set {setting}: expected KEY=VALUE with a key of {', '.join(known)}")
        try:
            keys[key] = json.loads(value)
        except json.JSONDecodeError:
            keys[key] = value
    return keys
