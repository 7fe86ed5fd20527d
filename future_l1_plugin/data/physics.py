"""Motion on the 4x4 grid of the micro world: five mechanics, and futures that only the seen motion tells apart.

Everything is exact on the grid: at each *step* a shape stands in one cell, and a clip shows one frame a step. A
`Motion` is a start cell and a velocity under a mechanic; `simulate` turns it into its 8 cells.

The heart is `counterfactuals`: all motions that put the shape in the SAME cell at the last seen step, grouped by where
it goes from there. A question takes its four options from four such groups and its truth from one of them, each
equally likely. So the answer follows neither from the text nor from the last frame, only from the motion.
"""

from dataclasses import dataclass
from functools import cache

SIZE = 4  # cells a side
STEPS = 8  # one step for each number of the frame pool
COLUMNS, ROWS = "abcd", "wxyz"

Cell = tuple[int, int]  # (column 0..3 from the left, row 0..3 from the top)

MECHANICS = ("bounce", "fall", "collide", "hide", "belt")
_DIAGONALS = [(x, y) for x in (-1, 0, 1) for y in (-1, 0, 1) if (x, y) != (0, 0)]
#: The belt: the 12 cells of the rim, clockwise from the top left.
RIM: list[Cell] = [
    *((x, 0) for x in range(SIZE - 1)),
    *((SIZE - 1, y) for y in range(SIZE - 1)),
    *((x, SIZE - 1) for x in range(SIZE - 1, 0, -1)),
    *((0, y) for y in range(SIZE - 1, 0, -1)),
]


def cell_name(cell: Cell) -> str:
    """'by' = second column from the left (a b c d), third row from the top (w x y z). One word, so one token."""
    return COLUMNS[cell[0]] + ROWS[cell[1]]


@dataclass(frozen=True)
class Motion:
    """start: the cell at step 0. velocity: cells per step (x, y); on the belt (places along the rim, 0).

    Under `fall` a y of 1 falls, a y of 0 floats.
    """

    start: Cell
    velocity: tuple[int, int]


@dataclass(frozen=True)
class Furniture:
    """What stands still: `block` (collide), `screen` = ('column' or 'row', index) (hide); floor and belt: no choice."""

    mechanic: str
    block: Cell | None = None
    screen: tuple[str, int] | None = None

    def hides(self, cell: Cell) -> bool:
        """Whether a shape in `cell` is behind the screen."""
        if self.screen is None:
            return False
        axis, index = self.screen
        return cell[0 if axis == "column" else 1] == index


def furnitures(mechanic: str) -> list[Furniture]:
    """All furniture that a mechanic can have."""
    if mechanic == "collide":
        return [Furniture(mechanic, block=(x, y)) for x in (1, 2) for y in (1, 2)]
    if mechanic == "hide":
        return [Furniture(mechanic, screen=(axis, i)) for axis in ("column", "row") for i in (1, 2)]
    return [Furniture(mechanic)]


def _reflect(position: int, velocity: int) -> tuple[int, int]:
    """One step between two walls: (position, velocity) after it. Turning at a wall takes a step."""
    if not 0 <= position + velocity < SIZE:
        return position, -velocity
    return position + velocity, velocity


def simulate(motion: Motion, furniture: Furniture) -> tuple[Cell, ...]:
    """The cells of steps 0..7.

    bounce, hide: straight lines, turned back by the walls. fall: sideways, and down one cell every second step.
    collide: as bounce, and a shape about to enter the block turns back. belt: round the rim at constant speed.
    """
    if furniture.mechanic == "belt":
        place, speed = RIM.index(motion.start), motion.velocity[0]
        return tuple(RIM[(place + speed * step) % len(RIM)] for step in range(STEPS))
    (x, y), (vx, vy) = motion.start, motion.velocity
    cells = [(x, y)]
    for step in range(1, STEPS):
        next_x, vx = _reflect(x, vx)
        if furniture.mechanic == "fall":
            next_y = min(y + vy * (step % 2 == 0), SIZE - 1)
        else:
            next_y, vy = _reflect(y, vy)
        if (next_x, next_y) == furniture.block:
            vx, vy = -vx, -vy
            next_x, vx = _reflect(x, vx)
            next_y, vy = _reflect(y, vy)
            if (next_x, next_y) == furniture.block:
                next_x, next_y = x, y
        x, y = next_x, next_y
        cells.append((x, y))
    return tuple(cells)


def motions(furniture: Furniture) -> list[Motion]:
    """All motions that the furniture allows."""
    if furniture.mechanic == "belt":
        return [Motion(cell, (speed, 0)) for cell in RIM for speed in (-2, -1, 0, 1, 2)]
    velocities = [(x, y) for x in (-1, 0, 1) for y in (0, 1)] if furniture.mechanic == "fall" else _DIAGONALS
    cells = [(x, y) for x in range(SIZE) for y in range(SIZE) if (x, y) != furniture.block]
    return [Motion(cell, velocity) for cell in cells for velocity in velocities]


@dataclass(frozen=True)
class Ask:
    """A kind of question. seen: steps shown; last: the seen step that the future follows; asked: the step asked for."""

    question_type: str
    seen: tuple[int, ...]
    last: int
    asked: int

    @property
    def between(self) -> tuple[int, ...]:
        """The steps to imagine, `last + 1 .. asked`."""
        return tuple(range(self.last + 1, self.asked + 1))


#: hop-n: n steps after the last of four seen frames. hop5 is FutureBench's name for interpolation: the middle is cut.
ASKS = {
    "hop1": Ask("hop1", (0, 1, 2, 3), 3, 4),
    "hop2": Ask("hop2", (0, 1, 2, 3), 3, 5),
    "hop3": Ask("hop3", (0, 1, 2, 3), 3, 6),
    "hop5": Ask("hop5", (0, 1, 6, 7), 1, 3),
}


@cache
def counterfactuals(furniture: Furniture, ask: Ask) -> list[dict[Cell, list[Motion]]]:
    """One dict a cell at step `ask.last`: {cell at step `ask.asked`: motions that lead there}, four cells or more.

    A motion counts only if the shape is seen at the first two steps shown (its direction can be read), is not behind
    the screen when asked for, and, under `hide`, is behind it at some step between.
    """
    groups: dict[Cell, dict[Cell, list[Motion]]] = {}
    for motion in motions(furniture):
        cells = simulate(motion, furniture)
        if any(furniture.hides(cells[step]) for step in (*ask.seen[:2], ask.asked)):
            continue
        if furniture.screen and not any(furniture.hides(cell) for cell in cells[ask.seen[1] : ask.asked]):
            continue
        groups.setdefault(cells[ask.last], {}).setdefault(cells[ask.asked], []).append(motion)
    return [futures for _, futures in sorted(groups.items()) if len(futures) >= 4]
