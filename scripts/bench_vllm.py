#!/usr/bin/env python
"""What latents cost in vLLM: tokens per second against stock vLLM, and against decoding with transformers. Needs a GPU.

    python scripts/bench_vllm.py --model CHECKPOINT [--tokens 500] [--batches 1 32 256] [--repeats 5]

Same model, same prompts (text), same number of output tokens, CUDA graphs, each engine in a process of its own. Of ten
output tokens eight are latents: spans are opened as soon as one ends. Two ways to ask: `serving` brings the latents
back, `rollout` also log-probabilities of the tokens (of stock vLLM too), mu and log p(end). Latents are drawn with vmf.

Goals: at least 0.95 of stock vLLM; at least 10 times `future_l1_plugin.model.generate` at batch 64.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from typing import Any

ENGINES = ("stock", "latent", "transformers")
HF_BATCH = 64
SPAN = 8  # latents
TEXT = "The ball moves to the left, then it falls behind the box. Where will it be {} steps later?"


def measure_vllm(engine: str, args: argparse.Namespace) -> dict[str, Any]:
    """{"serving 32": [seconds, ...], ..., "bytes": of a latent in a response, "copy": seconds for a step's latents}"""
    from vllm import LLM, SamplingParams

    from future_l1_plugin.integrations.vllm import engine_args, read_latents
    from future_l1_plugin.model import LatentConfig

    most = max(*args.batches, HF_BATCH)
    settings = {"max_model_len": args.tokens + 128, "max_num_seqs": most, "seed": 0, **args.engine_args}
    settings["enable_prefix_caching"] = False  # repeats must not find the prompts of the turn before
    if engine == "stock":
        stock = {"architectures": ["Qwen3VLForConditionalGeneration"]}
        # Random weights: it would not load a latent head, and time does not depend on values.
        llm = LLM(model=args.model, hf_overrides=stock, load_format="dummy", **settings)
    else:
        llm = LLM(**engine_args(args.model, **settings))
    tokens = LatentConfig.from_hf(llm.llm_engine.model_config.hf_config).tokens
    measured: dict[str, Any] = {}
    for way in ("serving", "rollout"):
        params = {"temperature": 1.0, "max_tokens": args.tokens, "ignore_eos": True}
        if way == "rollout":
            params["logprobs"] = 0
        if engine == "latent":
            params["logit_bias"] = {tokens.start: 100.0}
            params["extra_args"] = {
                "latent_policy": "vmf",
                "latent_mean_cosine": 0.9,
                "latent_limit": SPAN,
                "latent_exact": 1,
                "latent_return": "means" if way == "rollout" else "latents",
            }
        for batch in sorted({*args.batches, HF_BATCH}):
            chats = [[{"role": "user", "content": TEXT.format(i)}] for i in range(batch)]

            def run(chats=chats, params=params):
                return llm.chat(chats, SamplingParams(**params), use_tqdm=False)

            output = run()[0]  # warm-up
            measured[f"{way} {batch}"] = [seconds(run) for _ in range(args.repeats)]
            if engine == "latent":
                latents = len(read_latents(output).latents)
                measured[f"bytes {way}"] = len(json.dumps(output.kv_transfer_params)) / latents
    if engine == "latent":
        measured["copy"] = copy_seconds(most, llm.llm_engine.model_config)
    return measured


def copy_seconds(batch: int, config: Any) -> float:
    """Seconds to bring one step's latents (batch, H) to the host."""
    import torch

    z = torch.zeros(batch, config.get_hidden_size(), dtype=config.dtype, device=device())

    def run():
        for _ in range(100):
            z.to("cpu", non_blocking=True)
        wait()

    run()
    return min(seconds(run) for _ in range(5)) / 100


def measure_transformers(args: argparse.Namespace) -> dict[str, Any]:
    from future_l1_plugin.latent import build_policy
    from future_l1_plugin.model import generate, load

    model, processor = load(
        args.model, device=device(), dtype="bfloat16", fixed_latent_budget=True, max_latent_token=SPAN
    )
    chats = [[{"role": "user", "content": TEXT.format(i)}] for i in range(HF_BATCH)]
    texts = [processor.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) for chat in chats]
    inputs = processor(text=texts, padding=True, padding_side="left", return_tensors="pt").to(device())
    policy, start = build_policy("vmf", mean_cosine=0.9), model.config.latent_start_id

    def run():
        generate(
            model,
            inputs,
            policy=policy,
            max_new_tokens=args.tokens,
            min_new_tokens=args.tokens,
            temperature=1.0,
            sequence_bias={(start,): 100.0},
        )
        wait()

    run()
    return {f"serving {HF_BATCH}": [seconds(run) for _ in range(args.repeats)]}


def device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def wait() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds(run: Any) -> float:
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def report(args: argparse.Namespace, measured: dict[str, dict[str, Any]]) -> None:
    stock, latent, plain = (measured[engine] for engine in ENGINES)
    print("| way | batch | stock, tokens/s | latent, tokens/s | ratio | goal |\n|---|---|---|---|---|---|")
    for way in ("serving", "rollout"):
        for batch in sorted({*args.batches, HF_BATCH}):
            a, b = (batch * args.tokens / statistics.median(m[f"{way} {batch}"]) for m in (stock, latent))
            print(f"| {way} | {batch} | {a:.0f} | {b:.0f} | {b / a:.3f} | {'yes' if b >= 0.95 * a else '**no**'} |")
    key = f"serving {HF_BATCH}"
    gain = statistics.median(plain[key]) / statistics.median(latent[key])
    print(f"\nAgainst transformers at batch {HF_BATCH}: {gain:.1f} times (goal 10).")
    most = max(*args.batches, HF_BATCH)
    print(
        f"A latent in a response: {latent['bytes serving']:.0f} bytes, in a rollout {latent['bytes rollout']:.0f}. "
        f"Copy to the host: {latent['copy'] / most * 1e6:.2f} microseconds per latent at batch {most}."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="latent checkpoint")
    parser.add_argument("--tokens", type=int, default=500)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 32, 256])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--engine-args", type=json.loads, default={}, help="of vLLM, as JSON")
    parser.add_argument("--engine", choices=ENGINES, help=argparse.SUPPRESS)  # in a process of its own
    parser.add_argument("--anyway", action="store_true", help="without a GPU, to see that it runs: no figure counts")
    args = parser.parse_args()
    if device() == "cpu" and not args.anyway:
        sys.exit("bench_vllm: expected a CUDA device, found none. The CPU build interprets its kernels; see --anyway")
    if args.engine:
        measure = measure_transformers(args) if args.engine == "transformers" else measure_vllm(args.engine, args)
        print(json.dumps(measure))
        return
    measured = {}
    for engine in ENGINES:
        command = [sys.executable, __file__, *sys.argv[1:], "--engine", engine]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        # vLLM prints, too.
        (measured[engine],) = (json.loads(line) for line in done.stdout.splitlines() if line.startswith("{"))
    report(args, measured)


if __name__ == "__main__":
    main()
