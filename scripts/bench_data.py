#!/usr/bin/env python
"""What feeding and the latent loss cost in SFT, each figure against a peer that is measured in the same run.

    python scripts/bench_data.py [--only frames step] [--world FOLDER] [--turns 9]

frames   frames decoded and collated a second by `SftDataset` and `SftCollator` with two workers, against a plain loop
         over the same records: decord reads the frames, the processor runs on each sample, both in one process. Goal:
         1.5 times faster on two cores. Memory: no more than three batches a worker, one under way and two waiting.
step     forward and backward of `sft_losses` (latents e*, the paper's) against the same model's plain SFT step,
         `model(.., labels=..).loss`, on the same tokens and question frames. Goal: at most 1.10. Beside it, without a
         goal, the step that the micro recipe takes: the model's own latents, three passes.

Peers take turns (`future_l1_plugin.report.timing`).
"""

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from future_l1_plugin.data import load_records, make_world
from future_l1_plugin.data.frame_choice import pool_indices
from future_l1_plugin.data.sft import IGNORED, SftCollator, SftDataset
from future_l1_plugin.model import LatentConfig, load
from future_l1_plugin.model.objective import OURS, TEACHER_FORCING, OwnLatents, sft_losses
from future_l1_plugin.model.tiny import MICRO_BASE
from future_l1_plugin.report.timing import in_turns, median, ratio

PARTS = ("frames", "step")


def plain_loop(records: list, processor: Any, texts: dict[str, str]) -> int:
    """Frames read; every sample through decord and the processor, one after the other."""
    import decord

    read = 0
    for record in records:
        reader = decord.VideoReader(record.video, num_threads=1)
        pool = pool_indices(len(reader))
        frames = reader.get_batch([pool[n - 1] for n in [*record.image, *record.reasoning_image]]).asnumpy()
        processor(text=[texts[record.id]], images=list(frames), return_tensors="pt")
        read += len(frames)
    return read


def bench_frames(records: list, processor: Any, latent: LatentConfig, turns: int, workers: int) -> str:
    collator = SftCollator(processor, latent)
    # The same text as ours, with an image where we have a span: the plain way shows all frames to the processor.
    texts = {}
    for record in records:
        prompt = "".join(
            f"{part}<|vision_start|><|image_pad|><|vision_end|>" for part in record.question.split("<image>")[:-1]
        )
        future = "<|vision_start|><|image_pad|><|vision_end|>" * len(record.reasoning_image)
        texts[record.id] = prompt + record.question.split("<image>")[-1] + future + record.answer
    frames = sum(len(r.image) + len(r.reasoning_image) for r in records)

    # Persistent: workers are started once a training run.
    loader = DataLoader(
        SftDataset(records), batch_size=32, collate_fn=collator, num_workers=workers, persistent_workers=True
    )

    def ours() -> None:
        assert sum(len(batch["input_ids"]) for batch in loader) == len(records)

    def peer() -> None:
        assert plain_loop(records, processor, texts) == frames

    ours()
    times = in_turns({"plain": peer, "ours": ours}, turns)
    faster = 1 / ratio(times["ours"], times["plain"])
    a, b = (frames / median(times[name]) for name in ("plain", "ours"))
    met = "yes" if faster >= 1.5 else "**no**"
    return f"| frames per second, {workers} workers | {a:,.0f} | {b:,.0f} | {faster:.2f} times | 1.5 or more | {met} |"


def bench_step(records: list, model: Any, processor: Any, latent: LatentConfig, turns: int, batch: int) -> list[str]:
    dataset = SftDataset(records[:batch])
    inputs = SftCollator(processor, latent)([dataset[i] for i in range(batch)])
    plain_inputs = {key: value for key, value in inputs.items() if key not in OURS}
    tokens = int((inputs["labels"] != IGNORED).sum())

    def peer() -> None:
        model.zero_grad()
        model(**plain_inputs).loss.backward()

    def ours(own: OwnLatents) -> None:
        model.zero_grad()
        sft_losses(model, latent, dict(inputs), own, torch.Generator().manual_seed(0)).total.backward()

    runs = {"plain": peer, "e*": lambda: ours(TEACHER_FORCING), "own": lambda: ours(OwnLatents(1.0, 3))}
    for run in runs.values():
        run()
    times = in_turns(runs, turns)
    slower, own = (ratio(times[name], times["plain"]) for name in ("e*", "own"))
    base, ours_s, own_s = (median(times[name]) for name in runs)
    what = f"SFT step, {batch} samples, {tokens} learned tokens"
    met = "yes" if slower <= 1.1 else "**no**"
    return [
        f"| {what}, e* | {base:.3f} s | {ours_s:.3f} s | {slower:.3f} | 1.10 or less | {met} |",
        f"| {what}, own latents | {base:.3f} s | {own_s:.3f} s | {own:.3f} | - | - |",
    ]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--model", default=str(MICRO_BASE), help="latent checkpoint (default: the micro base)")
    parser.add_argument("--world", help="a micro world (default: a new one)")
    parser.add_argument("--records", type=int, default=480, help="records that are fed (default: 480)")
    parser.add_argument("--batch", type=int, default=32, help="samples of a step (default: 32)")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--turns", type=int, default=9)
    args = parser.parse_args(argv)
    torch.set_flush_denormal(True)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(args.world) if args.world else make_world(Path(folder) / "world", 16, args.records).root
        records = list(load_records(root / "sft.json", root / "videos"))[: args.records]
        model, processor = load(args.model, dtype=torch.float32)
        model.model.visual.requires_grad_(False)
        latent = LatentConfig.from_hf(model.config)
        print(f"{len(records)} records, {torch.get_num_threads()} threads, {args.turns} turns", file=sys.stderr)
        rows = []
        if "frames" in args.only:
            rows.append(bench_frames(records, processor, latent, args.turns, args.workers))
        if "step" in args.only:
            rows += bench_step(records, model, processor, latent, args.turns, args.batch)
    print("| what | peer | ours | ratio | goal | met |\n|---|---|---|---|---|---|")
    print("\n".join(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
