"""The micro world: small real videos whose future has to be imagined, with questions and training records.

A scene is one coloured shape under one of the five mechanics of `physics.py` (bounce off walls, fall, collide with a
block, hide behind a screen, follow a belt), now and then with a second shape that is not asked for. `make_world`
draws H.264 mp4 files of 64x64 pixels, two seconds per step, and writes

    futurebench.json   questions in FutureBench's schema: hop1, hop2, hop3, hop5 (= interpolation), four options;
                       the video holds the seen frames only
    sft.json           training records in the Future-L1-50K schema (TwiFF): question frames, thoughts, future frames
    perception.json    records about what is seen, no future: for pre-training a base model (`perception > 0`)
    videos/            test/*.mp4 (seen part), train/*.mp4 (whole clip), perception/*.mp4
    world.json         the arguments and counts; written last, so its presence says that the world is whole

Train and test share no scene (mechanic, furniture, motion, colour and shape together), and no two test questions do.
"""

import json
import random
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from future_l1_plugin.data.scenes import SECONDS_A_STEP, clip, seen_clip
from future_l1_plugin.data.video_writer import write_video
from future_l1_plugin.data.world_questions import (
    balanced_questions,
    futurebench_item,
    held_out_questions,
    perception_record,
    sft_record,
)
from future_l1_plugin.errors import DataError

VERSION = 1


@dataclass(frozen=True)
class World:
    """Where a micro world lies. `videos` is the root that video paths of the three JSON files are relative to."""

    root: Path

    @property
    def futurebench(self) -> Path:
        return self.root / "futurebench.json"

    @property
    def sft(self) -> Path:
        return self.root / "sft.json"

    @property
    def perception(self) -> Path:
        return self.root / "perception.json"

    @property
    def videos(self) -> Path:
        return self.root / "videos"

    @property
    def manifest(self) -> Path:
        return self.root / "world.json"


@dataclass(frozen=True)
class WorldSize:
    """The arguments of `make_world`."""

    test: int = 480
    train: int = 3000
    perception: int = 0
    seed: int = 0
    read_options: bool = False
    version: int = VERSION


def make_world(
    out: str | Path,
    test: int = 480,
    train: int = 3000,
    perception: int = 0,
    seed: int = 0,
    read_options: bool = False,
    progress: bool = True,
) -> World:
    """Draw a micro world into the folder `out`.

    `test` questions, `train` and `perception` records are made, each rounded up to a multiple of 16 (four question
    types x four answer letters, all equally frequent in `test` and `train`); `read_options`: see `perception_record`.
    A finished world with the same arguments is kept as it is; a broken-off one is completed (the same seed draws the
    same scenes, files already there are not drawn again). Until a world is finished its arguments lie in
    `world.json.part`; videos without either file are drawn again.

    Raises DataError if `out` holds a world made with other arguments, or if so many test questions use up the scenes.
    """
    world = World(Path(out))
    size = WorldSize(
        *(-(-count // 16) * 16 for count in (test, train, perception)), seed=seed, read_options=read_options
    )
    begun = world.manifest.with_name("world.json.part")
    found = next((json.loads(file.read_text()) for file in (world.manifest, begun) if file.exists()), None)
    if found not in (None, asdict(size)):
        raise DataError(
            f"{world.root}: holds a world made with {found}, wanted {asdict(size)}. "
            "Choose another folder, or delete this one."
        )
    if world.manifest.exists():
        return world
    if found is None:
        for clip_of_unknown_world in world.videos.glob("*/micro-*.mp4"):
            clip_of_unknown_world.unlink()
        world.root.mkdir(parents=True, exist_ok=True)
        begun.write_text(json.dumps(asdict(size)) + "\n")
    bar = tqdm(total=size.test + size.train + size.perception, desc="micro world", unit="clip", disable=not progress)

    def film(path: str, frames: Callable[[], np.ndarray], fps: float = 1 / SECONDS_A_STEP) -> None:
        target = world.videos / path
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            write_video(target, frames(), fps=fps)
        bar.update()

    items, records, seen_only = [], [], []
    test_scenes: set[tuple] = set()
    for i, question in enumerate(held_out_questions(seed, size.test)):
        test_scenes.add(question.scene.key)
        items.append(futurebench_item(question, name := f"micro-test-{i:05d}", path := f"test/{name}.mp4"))
        film(path, lambda q=question: seen_clip(q.scene, q.ask), 2 / SECONDS_A_STEP)
    for i, question in enumerate(balanced_questions(random.Random(f"train {seed}"), size.train, avoid=test_scenes)):
        records.append(sft_record(question, name := f"micro-train-{i:05d}", path := f"train/{name}.mp4"))
        film(path, lambda q=question: clip(q.scene))
    rng = random.Random(f"perception {seed}")
    for i in range(size.perception):
        scene, record = perception_record(
            rng, name := f"micro-seen-{i:05d}", path := f"perception/{name}.mp4", read_options
        )
        seen_only.append(record)
        film(path, lambda s=scene: clip(s))
    bar.close()
    files = [(world.futurebench, items), (world.sft, records), (world.perception, seen_only)]
    for file, rows in [*files, (begun, asdict(size))]:
        if rows:
            file.write_text(json.dumps(rows, indent=1) + "\n")
    begun.rename(world.manifest)
    return world
