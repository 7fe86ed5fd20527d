"""Drawing the micro world: a scene, a coloured shape under one of the mechanics of `physics`, as pictures and clips."""

from dataclasses import dataclass

import numpy as np

from future_l1_plugin.data.physics import SIZE, STEPS, Ask, Cell, Furniture, Motion

PIXELS = 64  # width and height of a frame
SECONDS_A_STEP = 2

COLOURS = {"red": (220, 40, 40), "green": (40, 180, 60), "blue": (50, 80, 230), "yellow": (230, 200, 40)}
SHAPES = ("circle", "square", "triangle")
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

    Qwen3-VL joins two neighbouring frames into one temporal patch. Two frames per step make each seen step look to the
    vision tower as a still picture does, and so as the future frames of training records do.
    """
    return np.stack([render(scene, step) for step in ask.seen for _ in range(2)])
