"""Bytes that a training step of verl puts and reads, counted inside its processes: `bench_rl.py --only bytes`.

`run` writes a module which verl imports in each of its processes and which calls `install`. There the ways are wrapped
that samples and pixels take; every process appends what it counts to a file of its own.

    queue put, queue read   tensors through TransferQueue, each a copy through a socket
    store put               pixels into Ray's object store, a copy
    request                 pixels that a rollout engine unpickles, a copy
    viewed                  pixels that engine or actor read where they lie, in shared memory: no copy

The peer is what verl's own agent loop does: pixels in float32, with each rollout, through the queue.
"""

import json
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

#: The full recipe: prompts per step, and bytes of a prompt's pixels in float32 at the cap of Qwen3-VL's video processor
#: (12,288 tokens of 4 patches, each 3 x 2 x 16 x 16 numbers).
PROMPTS, PIXEL_BYTES = 64, 12288 * 4 * 1536 * 4
STEPS, MICRO_PROMPTS = 2, 8
RANKS = ("trainer.n_gpus_per_node=2", "ray_kwargs.ray_init.num_gpus=2", "reward.num_workers=1")
COPIES = ("queue put", "queue read", "store put", "request")
PIXELS = ("pixel_values", "pixel_values_videos")
MODULE = "rl_bytes_probe"


def measure(run: Callable[..., Path], say: Callable[[str], None]) -> list[tuple[str, float, float, str]]:
    """(what, the peer's, ours, unit) of a step. run: `bench_rl.run_recipe`; say: where progress goes."""
    found = {}
    for name in ("verl", "ours"):
        say(f"bytes: {STEPS} steps of la_dapo_micro, pixels sent as {name} does")
        with tempfile.TemporaryDirectory() as folder:
            counts = Path(folder) / "counts"
            run(Path(folder), STEPS, *RANKS, *probe(counts, peer=name == "verl"))
            found[name] = {key: value / STEPS for key, value in counted(counts).items()}
        say("  " + ", ".join(f"{key} {value / 1e6:.2f} MB" for key, value in sorted(found[name].items())))
    pixels = {name: copied(each, "pixels") for name, each in found.items()}
    both = {name: pixels[name] + copied(each, "other") for name, each in found.items()}
    # How often a prompt's pixels are copied does not depend on their size. The micro models compute in float32; where
    # models compute in bfloat16, ours weigh half.
    once = found["ours"]["store put: pixels"] / MICRO_PROMPTS
    full = {name: each / (MICRO_PROMPTS * once) * PROMPTS * PIXEL_BYTES for name, each in pixels.items()}
    return [
        ("micro recipe, all fields", both["verl"] / 1e6, both["ours"] / 1e6, "MB"),
        ("full recipe, pixels (bf16)", full["verl"] / 1e9, full["ours"] / 2 / 1e9, "GB"),
    ]


def copied(counts: Mapping[str, float], kind: str) -> float:
    """Bytes of a kind, pixels or other, by all ways that copy."""
    return sum(counts.get(f"{way}: {kind}", 0) for way in COPIES)


def install(folder: str, peer: bool) -> None:
    """Count in this process. peer: send pixels as verl does."""
    from wrapt import register_post_import_hook, wrap_function_wrapper

    file, seen = Path(folder) / f"{os.getpid()}.json", Counter()

    def count(way: str, pixels: int, other: int = 0) -> None:
        seen[f"{way}: pixels"] += pixels
        seen[f"{way}: other"] += other
        file.write_text(json.dumps(seen))

    async def put(wrapped: Any, client: Any, args: Any, kwargs: Any) -> Any:
        count("queue put", *sizes(kwargs.get("data", args[0] if args else None)))
        return await wrapped(*args, **kwargs)

    async def read(wrapped: Any, client: Any, args: Any, kwargs: Any) -> Any:
        found = await wrapped(*args, **kwargs)
        count("queue read", *sizes(found))
        return found

    def share(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
        encoded = args[1]
        if not peer:
            count("store put", *sizes({k: v.to(args[2]) for k, v in encoded.inputs.items() if k in PIXELS}))
            return wrapped(*args, **kwargs)
        import ray

        from future_l1_plugin.integrations.verl.pixels import SharedPrompt

        count("store put", *sizes(encoded.inputs))
        return SharedPrompt(encoded.prompt_ids, dict(encoded.inputs), ray.put(encoded.inputs))

    def opened(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
        found = wrapped(*args, **kwargs)
        count("request" if peer else "viewed", sizes(found[0])[0])
        return found

    def client(module: Any) -> None:
        wrap_function_wrapper(module, "AsyncTransferQueueClient.async_put", put)
        wrap_function_wrapper(module, "AsyncTransferQueueClient.async_get_data", read)

    def pixels(module: Any) -> None:
        wrap_function_wrapper(module, "share", share)
        wrap_function_wrapper(module, "opened", opened)

    register_post_import_hook(client, "transfer_queue.client")
    register_post_import_hook(pixels, "future_l1_plugin.integrations.verl.pixels")


def sizes(data: Any) -> tuple[int, int]:
    """Bytes of the tensors anywhere in `data`: those under the names of pixels, and the rest."""
    pixels = other = 0
    stack = [("", data)]
    while stack:
        name, value = stack.pop()
        kind = type(value).__name__
        value = value.data if kind == "NonTensorData" else value
        value = (
            value.tolist()
            if kind == "NonTensorStack" or getattr(getattr(value, "dtype", None), "hasobject", False)
            else value
        )
        if tensor_bytes(value):
            pixels, other = (
                pixels + tensor_bytes(value) * (name in PIXELS),
                other + tensor_bytes(value) * (name not in PIXELS),
            )
        elif hasattr(value, "items"):
            stack += list(value.items())
        elif isinstance(value, list | tuple):
            stack += [(name, item) for item in value]
    return pixels, other


def tensor_bytes(value: Any) -> int:
    """Of a tensor, nested ones included, or of what `pixels.pack` made of one; else 0."""
    if isinstance(value, tuple) and len(value) == 3 and hasattr(value[0], "nbytes"):
        return value[0].nbytes
    if type(value).__name__ not in ("Tensor", "NestedTensor"):
        return 0
    value = value.values() if value.is_nested else value
    return value.numel() * value.element_size()


def probe(folder: Path, peer: bool) -> list[str]:
    """Hydra overrides of a run that counts. `folder` takes the counts and the module that starts them."""
    folder.mkdir()
    (folder / f"{MODULE}.py").write_text(f"import rl_bytes\nrl_bytes.install({str(folder)!r}, {peer})\n")
    env, path = "+ray_kwargs.ray_init.runtime_env.env_vars", f"{folder}:{Path(__file__).parent}"
    return [f"{env}.PYTHONPATH='{path}'", f"{env}.VERL_USE_EXTERNAL_MODULES={MODULE}"]


def counted(folder: Path) -> Counter:
    """The counts of all processes."""
    total: Counter = Counter()
    for file in folder.glob("*.json"):
        total.update(json.loads(file.read_text()))
    return total
