"""Questions about scenes of the micro world, drawn at random, and the rows that are made of them.

A question is one of FutureBench's kinds, with four options; each can be written as a FutureBench item and as a training
record in the Future-L1-50K schema. Records of perception are about what is seen, no future.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass

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
from future_l1_plugin.data.scenes import COLOURS, SECONDS_A_STEP, SHAPES, Figure, Scene
from future_l1_plugin.errors import DataError

LETTERS = "ABCD"
_TRIES = 10_000  # draws for one question before the scenes count as used up


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


def balanced_questions(rng: random.Random, count: int, avoid: set[tuple]) -> Iterator[Question]:
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
    for question in balanced_questions(random.Random(f"test {seed}"), count, avoid=scenes):
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
