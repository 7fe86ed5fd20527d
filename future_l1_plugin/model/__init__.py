"""The latent Qwen3-VL: configuration keys, convert, load, a tiny one, and decoding. Built on the stock class."""

from future_l1_plugin.model.checkpoint import attach_head, convert, load, save
from future_l1_plugin.model.config import LatentConfig
from future_l1_plugin.model.decode import LatentOutput, generate
from future_l1_plugin.model.export import export
from future_l1_plugin.model.template import SYSTEM_PROMPT, chat_template
from future_l1_plugin.model.tiny import make_tiny

__all__ = [
    "SYSTEM_PROMPT",
    "LatentConfig",
    "LatentOutput",
    "attach_head",
    "chat_template",
    "convert",
    "export",
    "generate",
    "load",
    "make_tiny",
    "save",
]
