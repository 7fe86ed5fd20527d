"""Arguments and generation settings of the model `future_l1`, checked. No torch, no lmms-eval."""

from dataclasses import dataclass, fields
from typing import Any

from future_l1_plugin.errors import ConfigError
from future_l1_plugin.values import flag, json_object, one_of, positive, whole

#: lmms-eval puts this into every task that sets no stop string; a thought with an empty line would end there.
INJECTED_UNTIL = ["\n\n"]
#: Generation settings that some tasks carry for one family of models; they say nothing to others.
FOREIGN = ("image_aspect_ratio", "use_cache")
#: Model arguments that one engine alone knows, with the value that says nothing (lmms-eval always gives a batch size).
ENGINES = {
    "hf": {"device": None, "attn_implementation": None, "batch_size": 1},
    "vllm": {"vllm_args": None},
}
WHOLE = ("batch_size", "max_num_frames", "min_pixels", "max_pixels", "max_latent_token", "loose_latent_budget")
DTYPES = ("auto", "float32", "bfloat16", "float16")
KNOWN = ("max_new_tokens", "temperature", "top_p", "top_k", "do_sample", "num_beams", "until")


@dataclass(frozen=True)
class Generation:
    """Generation settings of a request, resolved. temperature 0 = greedy; until = stop strings."""

    max_new_tokens: int = 2048
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    until: tuple[str, ...] = ()

    @classmethod
    def from_task(cls, given: dict[str, Any]) -> "Generation":
        """From a task's generation_kwargs, --gen_kwargs put over them.

        As in lmms-eval's own models, a temperature above 0 means sampling, whatever do_sample says; do_sample without
        a temperature means temperature 1. The stop string that lmms-eval injects (`INJECTED_UNTIL`) is dropped, and so
        cannot be asked for.

        Raises ConfigError on a setting that would be ignored.
        """
        given = {key: value for key, value in given.items() if key not in FOREIGN and value is not None}
        if unknown := sorted(set(given) - set(KNOWN)):
            raise ConfigError(
                f"generation settings {unknown}: future_l1 knows {', '.join(KNOWN)}. Take the others out of the task's "
                "generation_kwargs or of --gen_kwargs."
            )
        if given.get("num_beams", 1) != 1:
            raise ConfigError(f"num_beams={given['num_beams']}: latent decoding has no beam search; set it to 1")
        until = given.get("until", [])
        until = [until] if isinstance(until, str) else list(until)
        return cls(
            max_new_tokens=whole("max_new_tokens", given.get("max_new_tokens", cls.max_new_tokens)),
            temperature=float(given.get("temperature", 1.0 if given.get("do_sample") else 0.0)),
            top_p=float(given.get("top_p", cls.top_p)),
            top_k=whole("top_k", given.get("top_k", cls.top_k), least=0),
            until=() if until == INJECTED_UNTIL else tuple(until),
        )

    def cut(self, text: str) -> str:
        """`text` up to the first stop string."""
        ends = [position for stop in self.until if stop and (position := text.find(stop)) >= 0]
        return text[: min(ends)] if ends else text


@dataclass
class Arguments:
    """--model_args of `future_l1`, checked (--batch_size and --device of lmms-eval may be used as well).

    Attributes:
        pretrained: folder or hub id of a latent checkpoint.
        engine: hf (transformers, in this process) | vllm.
        device: default cuda if there is one, else cpu. Under `accelerate launch` each rank has its own. Engine hf only.
        dtype: auto (the checkpoint's) | float32 | bfloat16 | float16.
        batch_size: prompts decoded together. Engine hf only; vLLM makes batches of its own.
        vllm_args: a JSON object of vLLM's own arguments: tensor_parallel_size, gpu_memory_utilization, max_model_len ..
        max_num_frames: frames of a video, evenly spread; a shorter clip gives all it has (paper: 32).
        min_pixels, max_pixels: bounds for an image and for a frame of a video. Default: the settings of the
            checkpoint's processor (which for a video bound all its frames together).
        system_prompt: text, or a file that holds it; empty = none. Default: the one in the checkpoint's chat template;
            `convert` puts `future_l1_plugin.model.SYSTEM_PROMPT` there.
        policy: how latents are drawn around mu, a name of `build_policy`; policy_kwargs: a JSON object for it.
        max_latent_token, fixed_latent_budget, loose_latent_budget, infer_latent_multiplier: replace those of the
            checkpoint.
        attn_implementation: of transformers. Engine hf only.
        responses: JSONL that responses are appended to after every batch, and read from at the start. A response is
            used again only for the same checkpoint files, messages, media, settings and document. Default:
            outputs/lmms_eval/NAME-HASH.jsonl, one file for each checkpoint path.
        resume: False generates everything anew (and appends it).
        skip_bad: True gives a sample with unreadable media an empty response. Otherwise the run fails after the good
            samples and lists the bad ones.
    """

    pretrained: str
    engine: str = "hf"
    device: str | None = None
    dtype: str = "auto"
    batch_size: int | str = 1
    max_num_frames: int = 32
    min_pixels: int | None = None
    max_pixels: int | None = None
    system_prompt: str | None = None
    policy: str = "deterministic"
    policy_kwargs: str | dict[str, Any] | None = None
    max_latent_token: int | None = None
    fixed_latent_budget: bool | None = None
    loose_latent_budget: int | None = None
    infer_latent_multiplier: float | None = None
    attn_implementation: str | None = None
    vllm_args: str | dict[str, Any] | None = None
    responses: str | None = None
    resume: bool = True
    skip_bad: bool = False

    @classmethod
    def from_given(cls, given: dict[str, Any]) -> "Arguments":
        """Check arguments as lmms-eval passes them. Raises ConfigError: unknown or bad argument."""
        known = [field.name for field in fields(cls)]
        if unknown := sorted(given.keys() - set(known)):
            raise ConfigError(f"model_args of future_l1: unknown {unknown}; known are {', '.join(known)}")
        return cls(**given)

    def __post_init__(self) -> None:
        check_engine(self.engine, {name: getattr(self, name) for names in ENGINES.values() for name in names})
        self.pretrained = str(self.pretrained)
        one_of("dtype", self.dtype, DTYPES)
        for name in WHOLE:
            setattr(self, name, whole(name, getattr(self, name)))
        if None not in (self.min_pixels, self.max_pixels) and self.min_pixels > self.max_pixels:
            raise ConfigError(f"min_pixels={self.min_pixels} is above max_pixels={self.max_pixels}")
        self.system_prompt = None if self.system_prompt is None else str(self.system_prompt)
        for name in ("fixed_latent_budget", "resume", "skip_bad"):
            setattr(self, name, flag(name, getattr(self, name)))
        self.infer_latent_multiplier = positive("infer_latent_multiplier", self.infer_latent_multiplier)
        self.policy_kwargs = json_object("policy_kwargs", self.policy_kwargs)
        self.vllm_args = json_object("vllm_args", self.vllm_args)

    @property
    def view(self) -> dict[str, int | None]:
        """How media are shown, as a response's key has it."""
        return {name: getattr(self, name) for name in ("max_num_frames", "min_pixels", "max_pixels")}

    @property
    def budget(self) -> dict[str, Any]:
        """The latent keys that replace those of the checkpoint."""
        names = ("max_latent_token", "fixed_latent_budget", "loose_latent_budget", "infer_latent_multiplier")
        return {name: value for name in names if (value := getattr(self, name)) is not None}


def check_engine(engine: str, given: dict[str, Any]) -> None:
    """Raises ConfigError: no such engine, or an argument among `given` that only another one knows."""
    one_of("engine", engine, tuple(ENGINES))
    for other, names in ENGINES.items():
        wrong = [name for name, default in names.items() if str(given[name]) != str(default)]
        if other != engine and wrong:
            ways = {"hf": "", "vllm": ': vLLM has arguments of its own, vllm_args={"max_num_seqs": 64, ..}'}
            raise ConfigError(f"engine={engine} takes no {', '.join(wrong)}, which engine={other} does{ways[engine]}")
