#!/usr/bin/env python
"""What latent spans cost in decoding: time a token of `future_l1_plugin.model.generate` against plain `model.generate`.

    python scripts/bench_generate.py [--model PATH] [--tokens 128] [--repeats 15]

Same model, same prompts, same number of new tokens, greedy, in one process; the two take turns, and the ratio is the
median over the turns of the ratio within a turn, so that a machine that slows down meanwhile slows both. Half of our
tokens are latents (each response opens with a span). Goal: at most 1.05.
"""

import argparse
import statistics
import tempfile
import time

import torch

from future_l1_plugin.model import generate, load, make_tiny
from future_l1_plugin.model.tiny import MICRO_BASE


def prompts(processor, batch: int, device: str):
    """`batch` text prompts of different lengths, left-padded."""
    texts = [
        processor.apply_chat_template(
            [{"role": "user", "content": "Where will the red circle be? " * (1 + i % 4)}],
            tokenize=False,
            add_generation_prompt=True,
        )
        for i in range(batch)
    ]
    return processor(text=texts, padding=True, padding_side="left", return_tensors="pt").to(device)


def seconds(run, device: str) -> float:
    start = time.perf_counter()
    run()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="latent checkpoint (default: the micro base)")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = args.model or (MICRO_BASE if MICRO_BASE.exists() else make_tiny(f"{folder}/tiny"))
        model, processor = load(path, device=args.device, loose_latent_budget=args.tokens // 2)
    model.config.force_initial_latent_mode = True
    length = {"max_new_tokens": args.tokens, "min_new_tokens": args.tokens}
    where = f"{args.device}, {torch.get_num_threads()} threads"
    print(f"{path}: {args.tokens} new tokens, median of {args.repeats}, {where}")
    print("| batch | plain, ms per token | latent, ms per token | latents, share | ratio |\n|---|---|---|---|---|")
    for batch in args.batches:
        inputs = prompts(processor, batch, args.device)

        def plain(inputs=inputs):
            model.generate(**inputs, do_sample=False, **length)

        def latent(inputs=inputs):
            return generate(model, inputs, **length)

        plain()
        share = sum(len(z) for z in latent().latents) / (batch * args.tokens)
        times = [(seconds(plain, args.device), seconds(latent, args.device)) for _ in range(args.repeats)]
        a, b = (statistics.median(column) * 1000 / args.tokens for column in zip(*times, strict=True))
        ratio = statistics.median(latent_time / plain_time for plain_time, latent_time in times)
        print(f"| {batch} | {a:.3f} | {b:.3f} | {share:.0%} | {ratio:.3f} |", flush=True)


if __name__ == "__main__":
    main()
