"""The micro world: small real videos whose future has to be imagined, with questions and training records.

A scene is one coloured shape under one of the five mechanics of `physics.py` (bounce off walls, fall, collide with a
block, hide behind a screen, follow a belt), now and then with a second shape that is not asked for. `make_world`
draws H.264 mp4 files of 64x64 pixels, two seconds a step, and writes

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
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from future_l1_plugin.data.futurebench import ANSWER_IN_TAGS, multiple_choice_prompt
from future_l1_plugin.data.physics import (
    ASKS,
    MECHANICS,
    SIZE,
    STEPS,
    Ask,
    Cell,
    Furniture,
    Motion,
    cell_name,
    counterfactuals,
    furnitures,
    motions,
    simulate,
)
from future_l1_plugin.data.video_writer import write_video
from future_l1_plugin.errors import DataError

PIXELS = 64  # width and height of a frame
SECONDS_A_STEP = 2
VERSION = 1

COLOURS = {"red": (220, 40, 40), "green": (40, 180, 60), "blue": (50, 80, 230), "yellow": (230, 200, 40)}
SHAPES = ("circle", "square", "triangle")
LETTERS = "ABCD"
_TRIES = 10_000  # draws for one question before the scenes count as used up
_BACKGROUND, _GREY, _BROWN, _DARK = (18, 18, 24), (150, 150, 150), (120, 80, 50), (70, 60, 90)


@dataclass(frozen=True)
class Figure:
    """A moving shape: colour and shape names, its cell at each of the 8 steps."""

    colour: str
    shape: str
    cells: tuple[Cell, ...]

    @property
    def name(self) -> str:
        return f"{self.colour} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """All that is needed to draw a clip and to ask about it."""

    furniture: Furniture
    motion: Motion
    target: Figure
    others: tuple[Figure, ...] = ()

    @property
    def key(self) -> tuple:
        """What makes two scenes the same for the split: everything but bystanders."""
        return (self.furniture, self.motion, self.target.colour, self.target.shape)


def _draw(canvas: np.ndarray, figure: Figure, step: int) -> None:
    side, radius = PIXELS / SIZE, 6.0
    column, row = figure.cells[step]
    rows, columns = np.mgrid[0:PIXELS, 0:PIXELS] + 0.5
    dx, dy = columns - (column + 0.5) * side, rows - (row + 0.5) * side
    if figure.shape == "circle":
        inside = dx**2 + dy**2 <= radius**2
    elif figure.shape == "square":
        inside = (abs(dx) <= radius * 0.85) & (abs(dy) <= radius * 0.85)
    else:
        inside = (dy <= radius * 0.9) & (abs(dx) <= (dy + radius) * 0.6)
    canvas[inside] = COLOURS[figure.colour]


def render(scene: Scene, step: int) -> np.ndarray:
    """The picture at a step (0..7) as uint8 (64, 64, 3)."""
    canvas = np.full((PIXELS, PIXELS, 3), _BACKGROUND, dtype=np.uint8)
    side = PIXELS / SIZE

    def edge(i: int) -> int:
        return round(i * side)

    if scene.furniture.mechanic == "fall":
        canvas[-2:] = _BROWN
    if scene.furniture.mechanic == "belt":
        middle = round(side / 2)
        for strip in (np.s_[middle, middle:-middle], np.s_[-middle, middle:-middle]):
            canvas[strip] = _BROWN
            canvas.swapaxes(0, 1)[strip] = _BROWN
    if scene.furniture.block is not None:
        x, y = scene.furniture.block
        canvas[edge(y) + 1 : edge(y + 1) - 1, edge(x) + 1 : edge(x + 1) - 1] = _GREY
    for figure in (*scene.others, scene.target):
        _draw(canvas, figure, step)
    if scene.furniture.screen is not None:
        axis, i = scene.furniture.screen
        band = np.s_[edge(i) : edge(i + 1)]
        canvas[(slice(None), band) if axis == "column" else band] = _DARK
    return canvas


def clip(scene: Scene) -> np.ndarray:
    """The whole clip, uint8 (10, 64, 64, 3): the 8 steps, the first and the last of them twice.

    frame_pool(10) leaves out the first and the last frame of the file, so pool number n shows step n - 1.
    """
    return np.stack([render(scene, step) for step in (0, *range(STEPS), STEPS - 1)])


def seen_clip(scene: Scene, ask: Ask) -> np.ndarray:
    """The seen part, uint8 (8, 64, 64, 3): the steps `ask.seen`, each for two frames; a cut is a jump.

    Qwen3-VL joins two neighbouring frames into one temporal patch. Two frames a step make each seen step look to the
    vision tower as a still picture does, and so as the future frames of training records do.
    """
    return np.stack([render(scene, step) for step in ask.seen for _ in range(2)])


@dataclass(frozen=True)
class Question:
    """A scene, a kind of question, the options by letter and the right letter."""

    scene: Scene
    ask: Ask
    options: dict[str, str]
    answer: str

    @property
    def text(self) -> str:
        name = self.scene.target.name
        steps = len(self.ask.between)
        if self.ask.question_type == "hop5":
            return f"The middle of the video is cut out. Where was the {name} {steps} steps after the cut?"
        return f"Where will the {name} be {steps} step{'s' if steps > 1 else ''} later?"

    @property
    def prompt(self) -> str:
        return multiple_choice_prompt(self.text, self.options, post=ANSWER_IN_TAGS)


def _figure(rng: random.Random, cells: tuple[Cell, ...], avoid: str | None = None) -> Figure:
    colour = rng.choice([name for name in COLOURS if name != avoid])
    return Figure(colour, rng.choice(SHAPES), cells)


def _bystanders(rng: random.Random, furniture: Furniture, target: Figure) -> tuple[Figure, ...]:
    if rng.random() < 0.75:
        return ()
    cells = [(x, y) for x in range(SIZE) for y in range(SIZE)]
    motion = Motion(rng.choice(cells), (rng.choice((-1, 0, 1)), rng.choice((-1, 0, 1))))
    drifting = simulate(motion, Furniture("bounce"))
    return (_figure(rng, drifting, avoid=target.colour),)


def _options(rng: random.Random, cells: list[Cell], truth: Cell) -> tuple[dict[str, str], str]:
    """Four cells under four letters in random order, and the letter of the truth."""
    order = rng.sample(cells, 4)
    return {letter: cell_name(cell) for letter, cell in zip(LETTERS, order, strict=True)}, LETTERS[order.index(truth)]


def draw_question(rng: random.Random, question_type: str, mechanics: tuple[str, ...] = MECHANICS) -> Question:
    """A random question of this type. Of the four motions behind the options each is the truth equally often."""
    ask = ASKS[question_type]
    possible = [f for m in mechanics for f in furnitures(m) if counterfactuals(f, ask)]
    if not possible:
        raise DataError(f"none of the mechanics {list(mechanics)} can ask a question of type {question_type!r}")
    mechanic = rng.choice(sorted({f.mechanic for f in possible}))
    furniture = rng.choice([f for f in possible if f.mechanic == mechanic])
    futures = rng.choice(counterfactuals(furniture, ask))
    four = rng.sample(sorted(futures), 4)
    truth = rng.choice(four)
    motion = rng.choice(futures[truth])
    target = _figure(rng, simulate(motion, furniture))
    scene = Scene(furniture, motion, target, _bystanders(rng, furniture, target))
    return Question(scene, ask, *_options(rng, four, truth))


def _seen_trace(scene: Scene, steps: tuple[int, ...]) -> str:
    """'the red circle:0 aw,2 bx,4 hidden,6 dz': where the target stands at these steps, as far as it can be seen.

    The numbers are the seconds that Qwen3-VL writes before the frames of a video.
    """
    cells = [scene.target.cells[step] for step in steps]
    seen = ["hidden" if scene.furniture.hides(cell) else cell_name(cell) for cell in cells]
    return f"the {scene.target.name}:" + ",".join(f"{SECONDS_A_STEP * i} {cell}" for i, cell in enumerate(seen))


def _balanced(rng: random.Random, count: int, avoid: set[tuple]) -> Iterator[Question]:
    """`count` questions, each question type with each answer letter equally often, no scene of `avoid` (read live)."""
    for i in range(count):
        question_type, letter = sorted(ASKS)[i % 4], LETTERS[i // 4 % 4]
        for _ in range(_TRIES):
            question = draw_question(rng, question_type)
            if question.answer == letter and question.scene.key not in avoid:
                break
        else:
            raise DataError(
                f"the micro world has no {question_type} scene left after {len(avoid):,}. Ask for fewer test questions."
            )
        yield question


def held_out_questions(seed: int, count: int) -> Iterator[Question]:
    """The first `count` test questions of the worlds with this seed; no two of them share a scene."""
    scenes: set[tuple] = set()
    for question in _balanced(random.Random(f"test {seed}"), count, avoid=scenes):
        scenes.add(question.scene.key)
        yield question


def futurebench_item(question: Question, name: str, video_path: str) -> dict:
    """The question in FutureBench's schema."""
    return {
        "id": name,
        "video_path": f"video_dataset/{video_path}",
        "question_type": question.ask.question_type,
        "qa": {"Question": question.text, "Options": question.options, "Answer": question.answer},
        "meta": {"mechanic": question.scene.furniture.mechanic, "asked_cell": question.options[question.answer]},
    }


def sft_record(question: Question, name: str, video_path: str) -> dict:
    """The question as a Future-L1-50K row.

    The seen steps are told in words, the steps between are shown and not told (one future frame each), the last thought
    says where the target ended. Leaving the frames out gives the text-only control. The answer is the option's text,
    which the parser takes as well as its letter: binding cells to letters is no part of the method, and took a model of
    this size longer to learn than all else.
    """
    ask, scene = question.ask, question.scene
    thoughts = [_seen_trace(scene, ask.seen)]
    thoughts += ["then" for _ in ask.between[:-1]] + [f"it is at {cell_name(scene.target.cells[ask.asked])}"]
    gpt = "".join(
        f"THOUGHT {i}: {thought}\n" + ("<image>\n" if i < len(ask.between) else "")
        for i, thought in enumerate(thoughts)
    )
    return _row(name, video_path, ask.seen, question.prompt, gpt, ask.between, question.options[question.answer])


def _row(
    name: str, video: str, seen: tuple[int, ...], prompt: str, gpt: str, future: tuple[int, ...], answer: str
) -> dict:
    """A Future-L1-50K row; steps become one-based numbers of the frame pool."""
    frames = [step + 1 for step in seen]
    shown = "".join(f"frame_{number}\n<image>\n" for number in frames)
    return {
        "id": name,
        "conversations": [{"from": "human", "value": shown + prompt}, {"from": "gpt", "value": gpt}],
        "video": video,
        "image": frames,
        "reasoning_image": [step + 1 for step in future],
        "answer": answer,
    }


def perception_record(rng: random.Random, name: str, video_path: str, read_options: bool = False) -> tuple[Scene, dict]:
    """A scene and a record about what is seen: the cell of one shape in the last frame shown, no future.

    read_options: half of the records have one more thought, each option's cell with its letter, in random order.
    Shown are the four frames of a hop question, those around a cut, or one frame alone.
    """
    while True:
        furniture = rng.choice(furnitures(rng.choice(MECHANICS)))
        motion = rng.choice(motions(furniture))
        target = _figure(rng, simulate(motion, furniture))
        one = (rng.randrange(STEPS),)
        steps = rng.choice([ASKS["hop1"].seen, ASKS["hop5"].seen, one, one])
        truth = target.cells[steps[-1]]
        if not furniture.hides(truth):
            break
    scene = Scene(furniture, motion, target, _bystanders(rng, furniture, target))
    elsewhere = [(x, y) for x in range(SIZE) for y in range(SIZE) if (x, y) != truth]
    options, answer = _options(rng, [truth, *rng.sample(elsewhere, 3)], truth)
    prompt = multiple_choice_prompt(f"Where is the {target.name}?", options, post=ANSWER_IN_TAGS)
    thoughts = [_seen_trace(scene, steps), f"it is at {cell_name(truth)}"]
    if read_options and rng.random() < 0.5:
        thoughts.insert(1, ",".join(f"{cell} {letter}" for letter, cell in rng.sample(sorted(options.items()), 4)))
    gpt = "\n".join(f"THOUGHT {i}: {thought}" for i, thought in enumerate(thoughts))
    return scene, _row(name, video_path, steps, prompt, gpt, (), answer)


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
    for i, question in enumerate(_balanced(random.Random(f"train {seed}"), size.train, avoid=test_scenes)):
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
