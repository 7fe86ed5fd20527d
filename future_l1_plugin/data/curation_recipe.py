"""The recipe of a curation by visual gain (`data.curation`), and what it may hold."""

from dataclasses import dataclass, field, replace
from typing import Any

from future_l1_plugin.config import from_mapping
from future_l1_plugin.endpoint.settings import EndpointSettings
from future_l1_plugin.errors import ConfigError
from future_l1_plugin.rewards.judge import judge_settings
from future_l1_plugin.values import at_least, one_of

ENGINES = ("hf", "vllm", "endpoint")


@dataclass
class CurationData:
    """The records to choose from, and how a question is shown."""

    records: str = "???"
    videos: str = ""
    on_bad: str = "raise"
    question_media: str = "images"


@dataclass
class RolloutRecipe:
    """What the base model is asked."""

    engine: str = "hf"  # hf | vllm | endpoint
    n: int = 8  # answers to a question, with and without the future frames
    temperature: float = 1.0
    max_new_tokens: int = 512
    seed: int = 0
    instruction: str = "\nThink, then put only the final answer within <answer></answer>."


@dataclass
class HfRecipe:
    """engine hf: the base model in this process."""

    model: str = ""  # folder or hub id
    batch_size: int = 64  # answers decoded together
    device: str | None = None
    dtype: str = "auto"


@dataclass
class VllmRecipe:
    """engine vllm: the base model in vLLM, on this machine."""

    model: str = ""  # folder or hub id
    dtype: str = "auto"
    args: dict[str, Any] = field(default_factory=dict)  # of vLLM


@dataclass
class Selection:
    """Which records are taken.

    `sft.jsonl`: the top `size` by gain. `random.jsonl`: as many, drawn from all records alike. `rl_K.jsonl` for K of
    `rl_sizes`: K records that are not in `sft.jsonl` and whose reasoning has the format that RL rewards, in random
    order; a smaller file is the beginning of a larger one.
    """

    most_text: int = 6
    least_gain: int = 2
    size: int = 50_000
    rl_sizes: list[int] = field(default_factory=lambda: [5_000, 10_000, 20_000])
    seed: int = 0


@dataclass
class CurationRecipe:
    """A whole curation. `endpoint`: keys of EndpointSettings; `judge`: of JudgeSettings, null = the rule alone."""

    output: str = "???"
    data: CurationData = field(default_factory=CurationData)
    rollouts: RolloutRecipe = field(default_factory=RolloutRecipe)
    hf: HfRecipe = field(default_factory=HfRecipe)
    vllm: VllmRecipe = field(default_factory=VllmRecipe)
    endpoint: dict[str, Any] | None = None
    judge: dict[str, Any] | None = None
    select: Selection = field(default_factory=Selection)

    def __post_init__(self) -> None:
        rollouts, select = self.rollouts, self.select
        for key, value, allowed in (
            ("data.on_bad", self.data.on_bad, ("raise", "skip")),
            ("data.question_media", self.data.question_media, ("images", "video")),
            ("rollouts.engine", rollouts.engine, ENGINES),
        ):
            one_of(key, value, allowed)
        least = [("rollouts.n", rollouts.n, 1), ("rollouts.max_new_tokens", rollouts.max_new_tokens, 1)]
        least += [("hf.batch_size", self.hf.batch_size, 1), ("select.size", select.size, 1)]
        least += [("select.most_text", select.most_text, 0), ("select.least_gain", select.least_gain, 1)]
        least += [("select.rl_sizes", size, 1) for size in select.rl_sizes]
        for key, value, smallest in least:
            at_least(key, value, smallest)
        if rollouts.temperature <= 0:
            raise ConfigError(
                f"rollouts.temperature: expected a number above 0 (greedy answers are all alike), found "
                f"{rollouts.temperature}"
            )
        for engine, given in (("hf", self.hf), ("vllm", self.vllm)):
            if rollouts.engine == engine and not given.model:
                raise ConfigError(
                    f"{engine}.model must be given for rollouts.engine {engine}: the checkpoint that answers"
                )
        if rollouts.engine == "endpoint":
            self.endpoint_settings()
        if self.judge is not None:
            judge_settings(self.judge)

    def endpoint_settings(self) -> EndpointSettings:
        """`endpoint`, checked, with the sampling of `rollouts`. Raises ConfigError."""
        if self.endpoint is None:
            raise ConfigError("endpoint must be given for rollouts.engine endpoint: base_url, model, ..")
        for key, ours in (("temperature", "temperature"), ("max_tokens", "max_new_tokens")):
            if key in self.endpoint:
                raise ConfigError(f"endpoint.{key}: set rollouts.{ours} instead")
        settings = from_mapping(EndpointSettings, self.endpoint, "endpoint")
        return replace(settings, temperature=self.rollouts.temperature, max_tokens=self.rollouts.max_new_tokens)
