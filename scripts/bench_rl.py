#!/usr/bin/env python
"""What reinforcement learning with latents costs, each figure against a peer that is measured in the same run.

    python scripts/bench_rl.py [--only contrastive engine step import bytes] [--metrics FILE | --skip-run] [--turns 15]

contrastive   `outcome_contrastive` (a prompt at a time, and all prompts in one call) against a plain Python double loop
              over pairs of rollouts: step by step, and all steps of a pair at once. Goal: 50 times faster than the loop
              step by step, peak memory of the process under 2 GB (in a process of its own).
engine        forward and backward of the actor with latents (`LatentEngine`, `la_dapo_loss`) against verl's own engine
              (`FSDPEngineWithLMHead`, `ppo_loss`) on the same ids, for the micro base and for a wider and deeper random
              model. Peak memory is that of the tensors allocated during the pass. Goal: at most 1.03 times either.
step          share of a training step outside rollout, forward and backward, after warm-up: from a metrics file that
              verl wrote (`trainer.logger=[console,file]`), or from a short run of recipes/la_dapo_micro.yaml, from the
              micro base, without the group filter, validation and checkpoints. Goal: under 10%. This starts Ray.
import        what the plugin adds to `import verl` in a process that does not use it, with verl's own switch
              VERL_USE_EXTERNAL_PLUGINS=none for a peer; and the time to load it alone. Goal: under 0.2 s.
bytes         copied by a training step on its way from encoder to rollout engine and actor, against verl's own way
              (pixels in float32, with each rollout), on two ranks and two engines; and what follows for the full
              recipe. Goal: at most 1/8. This starts Ray twice. See rl_bytes.py.

Peers take turns, alternating who goes first, and a ratio is the median over the turns of the ratio within a turn. A
busy machine still blurs it: the ratio of processor times stands beside the ratio of wall times.
"""

import argparse
import contextlib
import json
import math
import multiprocessing
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from future_l1_plugin.report.timing import in_turns, median, ratio

RECIPES = Path(__file__).resolve().parent.parent / "recipes"
PARTS = ("contrastive", "engine", "step", "import", "bytes")
VMF = {"name": "vmf", "mean_cosine": 0.95}  # as in recipes/la_dapo_micro.yaml
#: Timers of verl that are rollout, forward and backward; the rest of `step` is overhead. `gen` holds the rewards of
#: single responses, `update_actor` the optimiser's step.
WORK = ("gen", "old_log_prob", "ref", "update_actor")


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def row(part: str, what: str, peer: str, ours: str, result: str, goal: str, met: bool | None) -> list[str]:
    return [part, what, peer, ours, result, goal, "-" if met is None else "yes" if met else "**no**"]


# Contrastive reward ---------------------------------------------------------------------------------------------------


def step_by_step(a: torch.Tensor, b: torch.Tensor) -> float:
    steps = range(min(len(a), len(b)))
    return sum((1 + float(a[t] @ b[t] / (a[t].norm() * b[t].norm()))) / 2 for t in steps) / len(steps)


def at_once(a: torch.Tensor, b: torch.Tensor) -> float:
    steps = min(len(a), len(b))
    return float((1 + torch.cosine_similarity(a[:steps], b[:steps], dim=-1)).mean() / 2)


def double_loop(latents: list, correct: list[bool], similarity: Callable, temperature: float = 0.5) -> list[float]:
    """R_ctr of one prompt's rollouts, pair by pair."""
    rewards = []
    for i, own in enumerate(latents):
        right, wrong = [], 0.0
        for j, other in enumerate(latents):
            if i == j:
                continue
            value = similarity(own, other)
            if correct[j]:
                right.append(value)
            else:
                wrong += math.exp(value / temperature)
        positive = math.exp(max(right) / temperature) if right else 0.0
        rewards.append(positive / (positive + wrong) if right else 0.0)
    return rewards


def status(key: str) -> float:
    """A line of /proc/self/status in MB. (`ru_maxrss` would include the parent's memory at the time of the fork.)"""
    text = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in text.splitlines() if line.startswith(key + ":")) * 1024 / 1e6


def contrastive_child(sizes: tuple[int, int, int, int], turns: int, threads: int, pipe: Any) -> None:
    """Sends (times by name, extra peak in MB by name, peak in MB)."""
    from future_l1_plugin.rewards import outcome_contrastive, outcome_contrastive_groups

    torch.set_num_threads(threads)
    prompts, n, steps, width = sizes
    generator = torch.Generator().manual_seed(0)
    latents = [torch.randn(steps, width, generator=generator) for _ in range(prompts * n)]
    correct = torch.rand(prompts * n, generator=generator) < 0.5
    group = torch.arange(prompts * n) // n
    of = [slice(p * n, (p + 1) * n) for p in range(prompts)]
    runs = {
        "batched": lambda: outcome_contrastive_groups(latents, correct, group),
        "one prompt at a time": lambda: torch.cat([outcome_contrastive(latents[p], correct[p]) for p in of]),
        "double loop, step by step": lambda: [
            x for p in of for x in double_loop(latents[p], correct[p].tolist(), step_by_step)
        ],
        "double loop, pair by pair": lambda: [
            x for p in of for x in double_loop(latents[p], correct[p].tolist(), at_once)
        ],
    }
    extra, values = {}, {}
    for name, run in runs.items():
        before = status("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
        values[name] = torch.as_tensor(run())
        extra[name] = status("VmHWM") - before
        torch.testing.assert_close(values[name].float(), values["batched"], rtol=1e-4, atol=1e-5)
    peak = status("VmHWM")
    pipe.send((in_turns(runs, turns), extra, peak))


def contrastive(args: argparse.Namespace) -> list[list[str]]:
    sizes = tuple(args.sizes)
    where = "{} x {} x {} x {}".format(*sizes)
    context = multiprocessing.get_context("spawn")
    receive, send = context.Pipe(duplex=False)
    child = context.Process(target=contrastive_child, args=(sizes, min(args.turns, 5), torch.get_num_threads(), send))
    child.start()
    send.close()
    try:
        times, extra, peak = receive.recv()
    except EOFError:
        raise SystemExit("bench_rl: the process of the contrastive reward failed, see above") from None
    finally:
        child.join()
    found = []
    for name in ("batched", "one prompt at a time"):
        for peer in ("double loop, step by step", "double loop, pair by pair"):
            faster = 1 / ratio(times[name], times[peer])
            goal = ("50 or more", faster >= 50) if "step by step" in peer else ("", None)
            result = f"{faster:.0f} times faster (processor: {1 / ratio(times[name], times[peer], 1):.0f})"
            a, b = f"{median(times[peer]):.3f} s", f"{median(times[name]):.4f} s"
            found.append(row("contrastive", f"{name}, {where}; peer: {peer}", a, b, result, *goal))
    found.append(
        row(
            "contrastive",
            "batched, peak memory beyond the latents",
            f"{extra['double loop, step by step']:.0f} MB",
            f"{extra['batched']:.0f} MB",
            f"whole process {peak:.0f} MB",
            "under 2000 MB",
            peak < 2000,
        )
    )
    return found


# Engine ---------------------------------------------------------------------------------------------------------------


def micro(folder: Path) -> Path:
    """The micro base with a latent head, as scripts/demo.sh starts from."""
    from future_l1_plugin.model import convert
    from future_l1_plugin.model.tiny import copy_micro_base

    base = copy_micro_base(folder / "base")
    head = {"use_projection_head": True, "projection_head_type": "lvr", "fixed_latent_budget": True}
    return Path(convert(base, folder / "start", system_prompt="", **head))


def larger(folder: Path) -> Path:
    """A random model of the same build: hidden size 512, 8 layers, 8192 rows of vocabulary, 32 million parameters."""
    from transformers import AutoProcessor, Qwen3VLConfig, Qwen3VLForConditionalGeneration

    from future_l1_plugin.model import LatentConfig
    from future_l1_plugin.model.checkpoint import attach_head, save

    small = micro(folder)
    config = Qwen3VLConfig.from_pretrained(small)
    sizes = {"hidden_size": 512, "num_hidden_layers": 8, "intermediate_size": 1536, "vocab_size": 8192}
    for key, value in {**sizes, "num_attention_heads": 16, "num_key_value_heads": 8}.items():
        setattr(config.text_config, key, value)
    config.vision_config.out_hidden_size = 512
    torch.manual_seed(0)
    model = Qwen3VLForConditionalGeneration(config)
    attach_head(model, LatentConfig.from_hf(model.config))
    save(model, AutoProcessor.from_pretrained(small), folder / "larger")
    return folder / "larger"


def make_engine(kind: type, path: Path) -> Any:
    """One rank; settings as in recipes/la_dapo_micro.yaml. verl registers its own engine for accelerators only."""
    from verl.trainer.config import CheckpointConfig
    from verl.workers.config import FSDPEngineConfig, FSDPOptimizerConfig, HFModelConfig

    precision = {"param_dtype": "fp32", "reduce_dtype": "fp32"}
    engine = kind(
        model_config=HFModelConfig(
            path=str(path),
            use_remove_padding=False,
            enable_gradient_checkpointing=False,
            override_config={"attn_implementation": "sdpa"},
        ),
        engine_config=FSDPEngineConfig(strategy="fsdp2", use_torch_compile=False, mixed_precision=precision),
        optimizer_config=FSDPOptimizerConfig(lr=1e-4, total_training_steps=10),
        checkpoint_config=CheckpointConfig(),
    )
    engine.initialize()
    for module in engine.module.modules():
        if "visual" in module._modules:
            module.visual.requires_grad_(False)
    return engine


def jagged(rows: list[torch.Tensor]) -> torch.Tensor:
    return torch.nested.as_nested_tensor(rows, layout=torch.jagged)


def rollouts(path: Path, count: int, width: int) -> Any:
    """`count` responses of 40 to 55 ids with two spans of four latents, to a video of four frames, as verl's trainer
    hands them to the actor."""
    from tensordict import NonTensorData, NonTensorStack, TensorDict
    from transformers import AutoProcessor
    from transformers.video_utils import VideoMetadata
    from verl.utils import tensordict_utils as tu

    from future_l1_plugin.latent import LatentTokens

    processor = AutoProcessor.from_pretrained(path)
    tokens = LatentTokens.from_tokenizer(processor.tokenizer)
    generator = torch.Generator().manual_seed(0)
    video = torch.randint(0, 255, (4, 64, 64, 3), generator=generator, dtype=torch.uint8).numpy()
    question = "Where will the red circle be 1 step later? a) aw b) bx c) cy d) dz " * 2
    text = f"<|im_start|>user\n<|vision_start|><|video_pad|><|vision_end|>{question}<|im_end|>\n<|im_start|>assistant\n"
    metadata = VideoMetadata(total_num_frames=4, fps=2.0, frames_indices=[0, 1, 2, 3])
    encoded = processor(
        text=[text],
        videos=[video],
        return_tensors="pt",
        videos_kwargs={"video_metadata": [metadata], "do_sample_frames": False},
    )
    prompt, media = encoded["input_ids"][0], {k: v for k, v in encoded.items() if k.startswith(("pixel", "video_grid"))}
    media["mm_token_type_ids"] = encoded["mm_token_type_ids"]
    del media["mm_token_type_ids"]  # verl passes positions, so the model asks for no token types
    span = torch.tensor([tokens.start, *[tokens.latent] * 4, tokens.end])

    def response(i: int) -> torch.Tensor:
        words = torch.randint(65, 91, (28 + i % 16,), generator=generator)
        return torch.cat([words[:8], span, words[8:16], span, words[16:]])

    responses = [response(i) for i in range(count)]
    ids = [torch.cat([prompt, response]) for response in responses]
    positions = [torch.arange(len(own)).expand(4, -1).contiguous() for own in ids]
    fields = {
        "input_ids": jagged(ids),
        "prompts": jagged([prompt] * count),
        "responses": jagged(responses),
        "response_mask": jagged([(own != tokens.end).long() for own in responses]),
        "position_ids": tu.nested_tensor_from_tensor_list(positions, ragged_idx=2),
        "advantages": jagged([torch.full((len(own),), (-1.0) ** i) for i, own in enumerate(responses)]),
        "latents": jagged([torch.randn(8, width, generator=generator) for _ in responses]),
    }
    batch = TensorDict(fields | {"loss_mask": fields["response_mask"].clone()}, batch_size=count)
    batch["multi_modal_inputs"] = NonTensorStack(*(NonTensorData(dict(media)) for _ in responses))
    return batch


def prepare(engine: Any, batch: Any, latent: bool) -> Any:
    """The batch with the keys of the trainer and the old and reference log-probabilities of this engine."""
    from verl.utils import tensordict_utils as tu
    from verl.workers.utils.padding import response_from_nested

    from future_l1_plugin.integrations.verl.columns import MU, RETURN_MU
    from future_l1_plugin.la_dapo import LatentScoring

    batch = batch.clone() if latent else batch.exclude("latents")
    own = {RETURN_MU: True} if latent else {}
    if latent:
        engine.scoring = LatentScoring.build(VMF, "sqrt_dim")
    settings = {"temperature": 1.0, "use_dynamic_bsz": True, "max_token_len_per_gpu": 20480}
    tu.assign_non_tensor(
        batch,
        use_remove_padding=False,
        calculate_entropy=False,
        global_batch_size=len(batch),
        **settings,
        **own,
    )
    with engine.eval_mode():
        output = engine.infer_batch(batch)["model_output"]
    batch["old_log_probs"] = response_from_nested(output["log_probs"], batch["response_mask"])
    batch["ref_log_prob"] = batch["old_log_probs"].clone()
    if latent:
        batch[MU] = jagged(list(output[MU].unbind()))
        tu.assign_non_tensor(batch, **{RETURN_MU: False})
    return batch


def peak_memory(run: Callable[[], Any]) -> float:
    """Peak of the tensor memory allocated during `run` beyond what was there before, in MB."""
    if torch.cuda.is_available():
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    # The resident set would be blurred by what the C library keeps back; the profiler sees each allocation.
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most / 1e6


def actor_passes(path: Path, count: int) -> dict[str, Callable[[], Any]]:
    """One forward and backward pass of either engine, as calls."""
    from verl.plugin.platform import get_platform
    from verl.workers.config import FSDPActorConfig
    from verl.workers.engine import FSDPEngineWithLMHead
    from verl.workers.utils.losses import ppo_loss

    from future_l1_plugin.integrations.verl.engine import LatentEngine
    from future_l1_plugin.integrations.verl.loss import loss_function
    from future_l1_plugin.la_dapo import LaDapoLoss, LatentScoring

    actor = FSDPActorConfig(
        strategy="fsdp2",
        rollout_n=8,
        ppo_mini_batch_size=count,
        use_dynamic_bsz=True,
        use_kl_loss=True,
        kl_loss_coef=0.01,
        clip_ratio_low=0.2,
        clip_ratio_high=0.28,
        entropy_coeff=0.0,
    )
    engines = {"verl": make_engine(FSDPEngineWithLMHead, path), "latent": make_engine(LatentEngine, path)}
    ours = engines["latent"]
    batch = rollouts(path, count, ours.module.config.get_text_config().hidden_size)
    batches = {name: prepare(engine, batch, name == "latent") for name, engine in engines.items()}
    losses = {
        "verl": lambda **given: ppo_loss(actor, **given),
        "latent": loss_function(LaDapoLoss(), LatentScoring.build(VMF, "sqrt_dim"), ours.latent.tokens.latent),
    }

    def call(name: str) -> Callable[[], Any]:
        engine, own, loss = engines[name], batches[name], losses[name]

        def run() -> Any:
            with engine.train_mode():  # leaves without gradients
                found = engine.forward_backward_batch(own, loss)
            get_platform().synchronize()
            return found

        return run

    return {name: call(name) for name in engines}


def engine(args: argparse.Namespace) -> list[list[str]]:
    import verl  # noqa: F401 (registers the platform of this machine)
    from verl.plugin.platform import get_platform

    backend = get_platform().communication_backend_name()
    torch.distributed.init_process_group(backend, rank=0, world_size=1, store=torch.distributed.HashStore())
    torch.set_flush_denormal(True)  # as our worker does on a CPU
    found = []
    try:
        for make, count in ((micro, args.rollouts), (larger, max(2, args.rollouts // 4))):
            if make.__name__ not in args.models:
                continue
            with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):  # verl prints
                passes = actor_passes(make(Path(folder)), count)
            say(f"engine: {make.__name__} model, {count} rollouts")
            for run in passes.values():  # warm-up
                run()
            memory = {name: peak_memory(run) for name, run in passes.items()}
            times = in_turns(passes, args.turns)
            slower = ratio(times["latent"], times["verl"])
            what = f"{make.__name__} model, {count} rollouts"
            result = f"{slower:.3f} (processor: {ratio(times['latent'], times['verl'], 1):.3f})"
            a, b = (f"{median(times[name]):.3f} s" for name in ("verl", "latent"))
            found.append(row("engine", f"{what}: time", a, b, result, "1.03 or less", slower <= 1.03))
            more = memory["latent"] / memory["verl"]
            a, b = (f"{memory[name]:.1f} MB" for name in ("verl", "latent"))
            found.append(row("engine", f"{what}: memory", a, b, f"{more:.3f}", "1.03 or less", more <= 1.03))
    finally:
        torch.distributed.destroy_process_group()
    return found


# Training step --------------------------------------------------------------------------------------------------------


def run_recipe(folder: Path, steps: int, *overrides: str) -> Path:
    """A short run of the micro recipe. Returns its metrics file."""
    from future_l1_plugin.data.world import make_world

    make_world(folder / "world", test=64, train=0, progress=False)
    data = f"[{folder / 'world' / 'futurebench.json'}]"
    command = [sys.executable, "-m", "verl.trainer.main_ppo", "--config-dir", str(RECIPES)]
    command += ["--config-name", "la_dapo_micro", f"hydra.run.dir={folder}/hydra", f"out={folder}"]
    command += [f"data.train_files={data}", f"data.val_files={data}", f"actor_rollout_ref.model.path={micro(folder)}"]
    command += [f"trainer.total_training_steps={steps}", "trainer.total_epochs=100", "trainer.val_before_train=false"]
    command += ["trainer.test_freq=-1", "trainer.save_freq=-1", "trainer.resume_mode=disable"]
    command += ["algorithm.filter_groups.enable=false"]  # an untrained model has no group of mixed answers
    command += overrides
    log = folder / "log.txt"
    with log.open("w") as file:
        done = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, check=False, timeout=1800)
    if done.returncode:
        raise SystemExit(f"bench_rl: the run of the recipe failed:\n{log.read_text()[-3000:]}")
    return folder / "la_dapo" / "metrics.jsonl"


def read_steps(path: Path, warm_up: int) -> list[dict[str, float]]:
    """Seconds by timer (`step` among them) for each training step after the first `warm_up`."""
    lines = [json.loads(line)["data"] for line in path.read_text().splitlines() if line.strip()]
    found = [
        {key.removeprefix("timing_s/"): value for key, value in line.items() if key.startswith("timing_s/")}
        for line in lines
        if "timing_s/step" in line
    ]
    if len(found) <= warm_up:
        raise SystemExit(
            f"bench_rl: {path} has {len(found)} training steps, {warm_up} of them are warm-up. Train longer"
        )
    return found[warm_up:]


def shares(steps: list[dict[str, float]]) -> dict[str, float]:
    """Each timer's share of the time of all steps; "no timer" is what verl does not time, "outside" all but `WORK`."""
    whole = sum(timers["step"] for timers in steps)
    names = {name for timers in steps for name in timers} - {"step", "testing"}  # validation is not part of the step
    found = {name: sum(timers.get(name, 0.0) for timers in steps) / whole for name in names}
    found["no timer"] = 1 - sum(found.values())
    return found | {"outside": 1 - sum(found.get(name, 0.0) for name in WORK)}


def step(args: argparse.Namespace) -> list[list[str]]:
    if args.metrics:
        steps = read_steps(args.metrics, args.warm_up)
    elif args.skip_run:
        return []
    else:
        say(f"step: {args.steps} steps of la_dapo_micro")
        with tempfile.TemporaryDirectory() as folder:
            steps = read_steps(run_recipe(Path(folder), args.steps), args.warm_up)
    for timers in steps:
        say("  " + ", ".join(f"{name} {seconds:.2f} s" for name, seconds in timers.items()))
    found, each = shares(steps), [shares([timers])["outside"] for timers in steps]
    outside = found.pop("outside")
    names = sorted(found, key=lambda name: (name not in WORK, -found[name]))
    parts = ", ".join(f"{name} {found[name]:.1%}" for name in names)
    seconds = statistics.mean(timers["step"] for timers in steps)
    return [
        row(
            "step",
            f"outside rollout, forward and backward, {len(steps)} steps; {parts}",
            f"step {seconds:.2f} s",
            f"{outside * seconds:.2f} s",
            f"{outside:.1%} ({min(each):.1%} to {max(each):.1%})",
            "under 10%",
            outside < 0.10,
        )
    ]


# Import ---------------------------------------------------------------------------------------------------------------


def import_verl(policy: str) -> tuple[float, float]:
    """Wall and processor seconds of a process that imports verl."""
    environment = {**os.environ, "VERL_USE_EXTERNAL_PLUGINS": policy}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    start = time.perf_counter()
    command = [sys.executable, "-c", "import verl"]
    subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wall = time.perf_counter() - start
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


#: verl loads its plugins at the end of `import verl`. This times the same thing alone, without the noise of the rest.
LOAD = """
import time, verl
from importlib.metadata import entry_points
wall, processor = time.perf_counter(), time.process_time()
for plugin in entry_points(group="verl.plugins"): plugin.load()
print(time.perf_counter() - wall, time.process_time() - processor)
"""


def load_plugin() -> tuple[float, float]:
    """Wall and processor seconds of loading the plugin in a process that has imported verl without it."""
    environment = {**os.environ, "VERL_USE_EXTERNAL_PLUGINS": "none"}
    done = subprocess.run([sys.executable, "-c", LOAD], env=environment, check=True, capture_output=True, text=True)
    wall, processor = done.stdout.split()[-2:]
    return float(wall), float(processor)


def imports(args: argparse.Namespace) -> list[list[str]]:
    times: dict[str, list[tuple[float, float]]] = {"none": [], "auto": []}
    for policy in times:  # reads the files into the cache
        import_verl(policy)
    for pair in range(args.pairs):
        for policy in list(times)[:: -1 if pair % 2 else 1]:
            times[policy].append(import_verl(policy))
        say(f"  pair {pair + 1} of {args.pairs}: " + ", ".join(f"{p} {t[-1][0]:.2f} s" for p, t in times.items()))
    pairs = list(zip(times["auto"], times["none"], strict=True))
    wall, processor = (statistics.median(ours[i] - peer[i] for ours, peer in pairs) for i in (0, 1))
    a, b = (f"{median(times[policy]):.2f} s" for policy in ("none", "auto"))
    result = f"{wall:+.3f} s (processor: {processor:+.3f} s)"
    alone = [load_plugin() for _ in range(args.pairs)]
    say("  alone: " + ", ".join(f"{seconds:.3f} s" for seconds, _ in alone))
    wall_alone, processor_alone = (statistics.median(one[i] for one in alone) for i in (0, 1))
    single = f"{wall_alone:.3f} s (processor: {processor_alone:.3f} s)"
    return [
        row("import", f"`import verl`, median of {len(pairs)} pairs", a, b, result, "under 0.2 s", wall < 0.2),
        row("import", "loading the plugin alone, after verl", "-", "-", single, "under 0.2 s", wall_alone < 0.2),
    ]


# Bytes of a step ------------------------------------------------------------------------------------------------------


def bytes_of_a_step(args: argparse.Namespace) -> list[list[str]]:
    import rl_bytes

    found = []
    for what, peer, ours, unit in rl_bytes.measure(run_recipe, say):
        a, b = (f"{value:.1f} {unit} a step" for value in (peer, ours))
        found.append(row("bytes", what, a, b, f"1/{peer / ours:.0f}", "1/8 or less", ours / peer <= 1 / 8))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="parts to run")
    parser.add_argument("--turns", type=int, default=15, help="of engines; the contrastive reward takes at most 5")
    parser.add_argument("--sizes", type=int, nargs=4, default=[64, 8, 16, 4096], help="prompts rollouts latents dims")
    parser.add_argument(
        "--rollouts", type=int, default=64, help="in the micro model's batch; a quarter in the larger's"
    )
    parser.add_argument("--models", nargs="+", choices=("micro", "larger"), default=("micro", "larger"))
    parser.add_argument("--metrics", type=Path, help="verl's metrics file, instead of a run of the recipe")
    parser.add_argument("--skip-run", action="store_true", help="leave the training step out if there is no --metrics")
    parser.add_argument("--steps", type=int, default=8, help="of the run")
    parser.add_argument("--warm-up", type=int, default=2, help="first steps of a run that do not count")
    parser.add_argument("--pairs", type=int, default=7, help="of imports")
    args = parser.parse_args()
    calls = {"contrastive": contrastive, "engine": engine, "step": step, "import": imports, "bytes": bytes_of_a_step}
    found = []
    for part in PARTS:
        if part in args.only:
            say(f"== {part}")
            found += calls[part](args)
    threads = torch.get_num_threads()
    print(f"{'cuda' if torch.cuda.is_available() else 'cpu'}, {threads} thread{'s' if threads > 1 else ''}\n")
    print("| part | what | peer | ours | result | goal | met |\n|---|---|---|---|---|---|---|")
    for cells in found:
        print("| " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
