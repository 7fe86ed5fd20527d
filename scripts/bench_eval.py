#!/usr/bin/env python
"""What batches are worth in evaluation: futurebench by `--model future_l1` at one batch size against batch size 1.

    python scripts/bench_eval.py [--model PATH] [--world FOLDER] [--questions 96] [--batch 16] [--turns 3]

Same model, same questions, same process, through lmms-eval's own evaluator; responses are generated anew each time, and
reading videos is part of the time, loading weights is not. The two take turns (`future_l1_plugin.report.timing`). Goal:
at least 4 times faster. The micro base answers at chance and briefly; a trained checkpoint makes for longer answers.
"""

import argparse
import os
import sys
import tempfile
from pathlib import Path

import torch

from future_l1_plugin.data import make_world
from future_l1_plugin.data.world import World
from future_l1_plugin.integrations.lmms_eval.adapter import FutureL1
from future_l1_plugin.model.tiny import MICRO_BASE
from future_l1_plugin.paths import lmms_tasks_dir
from future_l1_plugin.report.timing import in_turns, median, ratio


class Kept(FutureL1):
    """Keeps its weights over several runs of the evaluator, which frees them after each."""

    def clean(self) -> None:
        pass


def evaluate(model: FutureL1, questions: int, tokens: int) -> float:
    """Accuracy on the first `questions`."""
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.tasks import TaskManager

    tasks = TaskManager(include_path=str(lmms_tasks_dir()), include_defaults=False, model_name="future_l1")
    found = simple_evaluate(
        model=model,
        tasks=["futurebench"],
        task_manager=tasks,
        limit=questions,
        gen_kwargs=f"max_new_tokens={tokens}",
    )
    return found["results"]["futurebench"]["future_acc,none"]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(MICRO_BASE), help="latent checkpoint (default: the micro base)")
    parser.add_argument("--world", help="a micro world (default: a new one)")
    parser.add_argument("--questions", type=int, default=96)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=128, help="new tokens at most (default: 128)")
    parser.add_argument("--turns", type=int, default=3)
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        world = World(Path(args.world)) if args.world else make_world(Path(folder) / "world", args.questions, 0)
        os.environ |= {"FUTUREBENCH_DATA": str(world.futurebench), "FUTUREBENCH_VIDEO_DIR": str(world.videos)}
        log = str(Path(folder) / "responses.jsonl")
        runs, accuracy = {}, {}
        for batch in (1, args.batch):
            model = Kept(args.model, batch_size=batch, responses=log, resume=False)
            evaluate(model, args.batch, args.tokens)  # loads weights and warms up

            def run(model: FutureL1 = model, batch: int = batch) -> None:
                accuracy[batch] = evaluate(model, args.questions, args.tokens)

            runs[str(batch)] = run
        times = in_turns(runs, args.turns)
    faster = 1 / ratio(times[str(args.batch)], times["1"])
    one, many = (median(times[name]) / args.questions for name in runs)
    print(f"{args.model}: {args.questions} questions, {torch.get_num_threads()} threads, {args.turns} turns")
    print(f"| what | batch 1 | batch {args.batch} | faster | goal | met |\n|---|---|---|---|---|---|")
    met = "yes" if faster >= 4 else "**no**"
    print(f"| seconds per sample | {one:.3f} | {many:.3f} | {faster:.1f} times | 4 or more | {met} |")
    print(f"| accuracy | {accuracy[1]:.3f} | {accuracy[args.batch]:.3f} | | | |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
