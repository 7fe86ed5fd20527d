"""Whether an SFT run fits the GPUs it is started on: the estimate against the device, and what would help."""

import dataclasses
from dataclasses import dataclass

from future_l1_plugin.errors import ConfigError
from future_l1_plugin.integrations.sft.deepspeed import NAMES
from future_l1_plugin.integrations.sft.host import Host
from future_l1_plugin.integrations.sft.memory import (
    Part,
    Sharding,
    Sizes,
    activations,
    model_states,
    with_four_bits,
    with_lora,
)
from future_l1_plugin.integrations.sft.recipe import SftRecipe
from future_l1_plugin.integrations.sft.sizes import model_sizes
from future_l1_plugin.resume.table import Kind, rule_of

ASSUMED = 80.0  # GiB, where no GPU is at hand
GIB = 2**30


@dataclass(frozen=True)
class Device:
    """A GPU's memory in GiB, and where the figure comes from."""

    gib: float
    said: str


def device_here() -> Device | None:
    """The smallest of the GPUs that this process sees; None without one."""
    import torch

    if not torch.cuda.is_available():
        return None
    gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    smallest = min(gpus, key=lambda gpu: gpu.total_memory)
    gib = smallest.total_memory / GIB
    return Device(gib, f"{gib:.1f} GiB a GPU ({smallest.name})")


def device_for_dry_run(gib: float | None) -> Device:
    """What a dry run measures against: the memory given, else that of the GPU here, else an assumed one."""
    if gib is not None:
        return Device(gib, f"{gib:g} GiB a GPU (--gpu-memory)")
    return device_here() or Device(ASSUMED, f"{ASSUMED:g} GiB a GPU (assumed: no GPU is here, see --gpu-memory)")


def needs(
    recipe: SftRecipe, sharding: Sharding | None, sizes: Sizes, gpus: int, bf16: bool
) -> tuple[list[Part], list[Part]]:
    """(model states, activations of a pass of data.max_length tokens per sample) on each GPU."""
    tokens = recipe.train.micro_batch_size * recipe.data.max_length
    passing = activations(sizes, tokens, bf16, recipe.train.gradient_checkpointing)
    return model_states(sizes, gpus, bf16, sharding), passing


def problem(
    recipe: SftRecipe,
    sharding: Sharding | None,
    sizes: Sizes,
    gpus: int,
    bf16: bool,
    device: Device,
    going_on: bool = False,
) -> str:
    """Why the run does not fit, with the keys that help and what each would need; empty if it fits.

    going_on: only what a run may change that goes on from its checkpoint.
    """

    def gib(recipe: SftRecipe, sharding: Sharding | None, sizes: Sizes, gpus: int) -> float:
        states, passing = needs(recipe, sharding, sizes, gpus, bf16)
        return sum(part.bytes for part in (*states, *passing)) / GIB

    def train(**changes) -> SftRecipe:
        return dataclasses.replace(recipe, train=dataclasses.replace(recipe.train, **changes))

    now = gib(recipe, sharding, sizes, gpus)
    if now <= device.gib:
        return ""
    zero3, offload, key = NAMES["zero3"], NAMES["zero3_offload"], recipe.sharding_key
    shorter = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, max_length=recipe.data.max_length // 2))
    more = max(8, gpus)
    where = f"GPUS={more} scripts/sft.sh .. {key}=zero3" if gpus <= 8 else f"{key}=zero3 on these {gpus} GPUs"
    ways = [
        (where, gib(recipe, zero3, sizes, more)),
        (f"{key}=zero3_offload (slower; the CPU's memory holds the rest)", gib(recipe, offload, sizes, gpus)),
        ("train.gradient_checkpointing=true", gib(train(gradient_checkpointing=True), sharding, sizes, gpus)),
        ("train.micro_batch_size=1", gib(train(micro_batch_size=1), sharding, sizes, gpus)),
        (f"data.max_length={shorter.data.max_length}", gib(shorter, sharding, sizes, gpus)),
    ]
    adapted = sizes if recipe.train.lora.rank else with_lora(sizes, 64)
    if not recipe.train.lora.rank:
        ways.append(("train.lora.rank=64", gib(recipe, sharding, adapted, gpus)))
    if not recipe.train.lora.bits and not recipe.qwen_vl_finetune.path:
        keys = ["train.lora.bits=4", *(["train.lora.rank=64"] if adapted is not sizes else [])]
        keys += [f"{key}=null"] if sharding is not None else []
        ways.append((f"{' '.join(keys)} (QLoRA)", gib(recipe, None, with_four_bits(adapted), gpus)))
    if going_on:
        ways = [(way, amount) for way, amount in ways if rule_of("sft", _key(way)).kind is Kind.COST]
    lines = [
        f"  {way}: {amount:.1f} GiB, {'fits' if amount <= device.gib else 'helps, too little alone'}"
        for way, amount in sorted(ways, key=lambda pair: pair[1])
        if amount < 0.99 * now
    ]
    return (
        f"on {gpus} GPU{'s' if gpus > 1 else ''} this run needs about {now:.1f} GiB on each, and there are "
        f"{device.said}. What helps:\n"
        + "\n".join(lines or ["  larger GPUs" if going_on else "  a smaller model"])
        + "\n"
        "The estimate takes samples of data.max_length tokens; for shorter ones train.check_memory=false starts anyway."
    )


def _key(way: str) -> str:
    """The recipe key that a line of `problem` sets."""
    return next(word for word in way.split() if "." in word and "=" in word).partition("=")[0]


def check(recipe: SftRecipe, host: Host, gpus: int, bf16: bool, arguments: object, going_on: bool = False) -> None:
    """Refuse a run that does not fit the GPUs it would run on, before weights are loaded; a CPU is not measured.

    Raises ConfigError: see `problem`; recipe's train.check_memory decides whether it is asked at all.
    """
    device = device_here()
    if device is None or not recipe.train.check_memory:
        return
    sizes = model_sizes(recipe, host, arguments)
    if found := problem(recipe, host.sharding(), sizes, gpus, bf16, device, going_on):
        raise ConfigError(found)
