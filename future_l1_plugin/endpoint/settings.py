"""Where a served model is and how it is asked, and the key for it.

The key: the content of `api_key_file`, else OPENAI_API_KEY, which the openai client reads itself. A server other than
OpenAI's usually wants none; without a key the placeholder "none" is sent there, because the client insists on one.
"""

import dataclasses
import math
import os
from pathlib import Path
from urllib.parse import urlsplit

from future_l1_plugin.errors import ConfigError
from future_l1_plugin.values import at_least

MISSING = "???"
#: Sent as key to a server that is not OpenAI's when no key is given.
NO_KEY = "none"


@dataclasses.dataclass
class EndpointSettings:
    """Where the endpoint is and how it is asked. Usable as a section of a recipe."""

    base_url: str = "https://api.openai.com/v1"
    model: str = MISSING
    api_key_file: str | None = None  # a file that holds the key and nothing else; see the module's docstring
    timeout_s: float = 60.0  # for one request, from connecting to the last byte of the reply
    max_concurrency: int = 16  # requests at a time in one event loop (a process usually runs one)
    max_retries: int = 5  # further requests after a failed one
    backoff_s: float = 1.0  # wait before the first retry; doubles with each, minus up to half of it at random
    max_backoff_s: float = 120.0  # the longest wait; a server that asks for a longer one counts as unavailable
    temperature: float | None = 0.0  # null = not sent, for models that refuse it
    max_tokens: int | None = 1024  # of the reply, thoughts included; null = not sent
    cache: str | None = None  # SQLite file of replies, made if absent; processes may share it; null = no cache

    def __post_init__(self) -> None:
        try:
            url = urlsplit(self.base_url)
            usable = url.scheme in ("http", "https") and url.hostname
        except ValueError:
            usable = False
        if not usable:
            raise ConfigError(f"base_url: expected a URL such as http://localhost:8000/v1, found {self.base_url!r}")
        for name, least in (("max_concurrency", 1), ("max_retries", 0), ("max_tokens", 1), ("temperature", 0)):
            if (value := getattr(self, name)) is not None:
                at_least(name, value, least)
        for name in ("timeout_s", "backoff_s", "max_backoff_s"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ConfigError(f"{name}: expected seconds above 0, found {value!r}")


def find_key(settings: EndpointSettings) -> tuple[str | None, str]:
    """(key, where it comes from in words). None: the openai client takes it from OPENAI_API_KEY."""
    if settings.api_key_file:
        path = Path(settings.api_key_file).expanduser()
        try:
            key = path.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(
                f"api_key_file: expected a text file with the key, {path} cannot be read: {error}"
            ) from error
        if not key or not key.isascii() or len(key.split()) != 1:
            raise ConfigError(f"api_key_file: expected one word in {path}, the key, found {len(key.split())} words")
        return key, f"from {path}"
    if os.environ.get("OPENAI_API_KEY"):
        return None, "from OPENAI_API_KEY"
    host = urlsplit(settings.base_url).hostname or ""
    if host == "openai.com" or host.endswith(".openai.com"):
        raise ConfigError(
            f"{host} wants a key. Put it into a file and name that as api_key_file, or set OPENAI_API_KEY"
        )
    return NO_KEY, "none was given"
