"""Errors that a user can fix. The command line prints their message without a traceback and exits with 2.

Each message says what was expected, what was found, and what to do.
"""

from typing import Any


class UserError(ValueError):
    """Base class: wrong input, not a bug of ours."""


class ConfigError(UserError):
    """A recipe, flag or checkpoint setting is wrong: unknown key, bad value, two settings that exclude each other."""


class CheckpointError(UserError):
    """A checkpoint cannot be used as it is: no latent tokens, ids that differ from its config, missing files."""


class DataError(UserError):
    """A record or a video is wrong. The message starts with the file and the sample's id."""


class EnvironmentMismatch(UserError):
    """A package is missing, too old or too new. The message holds the command that fixes it."""


class RewardError(UserError):
    """A reward cannot be computed from what it was given, or a term gave no finite number. Names the sample."""


class TrainingError(UserError):
    """A run cannot go on as it is: a loss or a gradient is not finite. What it saved before is kept."""


def shorten(value: Any) -> str:
    """Its `repr` for a message, the middle left out if it is long."""
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:100]} ... {text[-100:]}"
