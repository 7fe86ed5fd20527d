"""The micro world: motion worked out by hand, questions that only the motion answers, and files that hold both."""

import json
import random
import re
from collections import Counter

import av
import numpy as np
import pytest

from future_l1_plugin.data import load_records, make_world, read_frames, world_questions
from future_l1_plugin.data import scenes as scenes_module
from future_l1_plugin.data import world as world_module
from future_l1_plugin.data.futurebench import load_items
from future_l1_plugin.data.physics import (
    ASKS,
    COLUMNS,
    MECHANICS,
    RIM,
    ROWS,
    SIZE,
    STEPS,
    Furniture,
    Motion,
    cell_name,
    counterfactuals,
    furnitures,
    motions,
    simulate,
)
from future_l1_plugin.data.records import Frame, Text
from future_l1_plugin.data.scenes import clip, render, seen_clip
from future_l1_plugin.data.world_questions import balanced_questions, draw_question, futurebench_item
from future_l1_plugin.errors import DataError

COUNTS = {"test": 32, "train": 32, "perception": 16}
CODEC_ERROR = 5.0  # mean over pixels, of 255: colours are halved in yuv420p, which costs most at the edges of shapes
EVERY = [(furniture, ask) for m in MECHANICS for furniture in furnitures(m) for ask in ASKS.values()]


@pytest.fixture(scope="module")
def drawn() -> dict[str, np.ndarray]:
    """The frames handed to the encoder, by file name; filled by `world`."""
    return {}


@pytest.fixture(scope="module")
def world(tmp_path_factory, drawn):
    original = world_module.write_video

    def write_video(path, frames, fps):
        drawn[path.name] = frames
        original(path, frames, fps=fps)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(world_module, "write_video", write_video)
        return make_world(tmp_path_factory.mktemp("world"), **COUNTS, seed=0, progress=False)


def read(file):
    return json.loads(file.read_text())


def cell(name: str) -> tuple[int, int]:
    return COLUMNS.index(name[0]), ROWS.index(name[1])


# ---- motion ---------------------------------------------------------------------------------------------------------


def columns(cells):
    return [x for x, _ in cells]


def rows(cells):
    return [y for _, y in cells]


@pytest.mark.parametrize("mechanic", ["bounce", "hide"])
def test_bounce_off_both_walls(mechanic):
    furniture = furnitures(mechanic)[0]
    to_the_right = simulate(Motion((2, 0), (1, 0)), furniture)
    assert columns(to_the_right) == [2, 3, 3, 2, 1, 0, 0, 1]  # turning at a wall takes a step
    assert rows(to_the_right) == [0] * 8
    down = simulate(Motion((1, 1), (0, 1)), furniture)
    assert columns(down) == [1] * 8
    assert rows(down) == [1, 2, 3, 3, 2, 1, 0, 0]
    diagonal = simulate(Motion((1, 3), (1, 1)), furniture)
    assert columns(diagonal) == [1, 2, 3, 3, 2, 1, 0, 0]
    assert rows(diagonal) == [3, 3, 2, 1, 0, 0, 1, 2]


def test_hide_moves_as_bounce():
    for furniture in furnitures("hide"):
        for motion in motions(furniture):
            assert simulate(motion, furniture) == simulate(motion, Furniture("bounce"))


def test_fall():
    (floor,) = furnitures("fall")
    sideways = simulate(Motion((0, 0), (1, 1)), floor)
    assert columns(sideways) == [0, 1, 2, 3, 3, 2, 1, 0]
    assert rows(sideways) == [0, 0, 1, 1, 2, 2, 3, 3]
    assert rows(simulate(Motion((1, 2), (0, 1)), floor)) == [2, 2, 3, 3, 3, 3, 3, 3]  # it stays on the floor
    assert rows(simulate(Motion((1, 2), (-1, 0)), floor)) == [2] * 8  # it floats


def test_collide_turns_back_at_the_block():
    block = Furniture("collide", block=(2, 1))
    assert columns(simulate(Motion((0, 1), (1, 0)), block)) == [0, 1, 0, 0, 1, 0, 0, 1]
    assert columns(simulate(Motion((0, 0), (1, 0)), block)) == [0, 1, 2, 3, 3, 2, 1, 0]  # it passes beside the block
    diagonal = simulate(Motion((0, 3), (1, -1)), block)  # (1, 2), then (2, 1) is the block: the way it came
    assert diagonal[:5] == ((0, 3), (1, 2), (0, 3), (0, 3), (1, 2))
    between = Furniture("collide", block=(1, 1))  # no room between wall and block
    assert columns(simulate(Motion((0, 1), (1, 0)), between)) == [0] * 8


def test_nothing_enters_the_block_or_leaves_the_grid():
    for furniture in (f for m in MECHANICS for f in furnitures(m)):
        for motion in motions(furniture):
            path = simulate(motion, furniture)
            assert len(path) == STEPS
            assert path[0] == motion.start
            assert furniture.block not in path
            assert all(0 <= x < SIZE and 0 <= y < SIZE for x, y in path)


def test_belt_in_both_directions():
    (belt,) = furnitures("belt")
    clockwise = simulate(Motion((2, 0), (1, 0)), belt)
    assert clockwise == ((2, 0), (3, 0), (3, 1), (3, 2), (3, 3), (2, 3), (1, 3), (0, 3))
    back_at_double_speed = simulate(Motion((0, 0), (-2, 0)), belt)
    assert back_at_double_speed == ((0, 0), (0, 2), (1, 3), (3, 3), (3, 1), (2, 0), (0, 0), (0, 2))
    assert len(RIM) == len(set(RIM)) == 12
    assert all(x in (0, 3) or y in (0, 3) for x, y in RIM)


def test_cell_names_are_all_different():
    assert cell_name((1, 2)) == "by"
    names = {cell_name((x, y)) for x in range(SIZE) for y in range(SIZE)}
    assert len(names) == SIZE**2
    assert all(cell_name(cell(name)) == name for name in names)


# ---- counterfactuals ------------------------------------------------------------------------------------------------


def test_counterfactuals_agree_up_to_the_last_seen_cell_and_part_there():
    groups = 0
    for furniture, ask in EVERY:
        for futures in counterfactuals(furniture, ask):
            groups += 1
            assert len(futures) >= 4
            paths = {future: [simulate(m, furniture) for m in behind] for future, behind in futures.items()}
            assert len({path[ask.last] for behind in paths.values() for path in behind}) == 1
            for future, behind in paths.items():
                assert behind
                assert all(path[ask.asked] == future for path in behind)
    assert groups > 100


def test_hidden_shapes_are_seen_first_hidden_between_and_seen_when_asked_for():
    for furniture, ask in EVERY:
        if furniture.mechanic != "hide":
            continue
        for futures in counterfactuals(furniture, ask):
            for motion in (m for behind in futures.values() for m in behind):
                hidden = [furniture.hides(c) for c in simulate(motion, furniture)]
                assert not hidden[ask.seen[0]]
                assert not hidden[ask.seen[1]]
                assert not hidden[ask.asked]
                assert any(hidden[ask.seen[1] : ask.asked])


def test_steps_of_the_question_types():
    between = {name: (ask.last, list(ask.between)) for name, ask in ASKS.items()}
    assert between == {"hop1": (3, [4]), "hop2": (3, [4, 5]), "hop3": (3, [4, 5, 6]), "hop5": (1, [2, 3])}
    assert all(not set(ask.between) & set(ask.seen) for ask in ASKS.values())


@pytest.mark.parametrize("question_type", sorted(ASKS))
def test_a_question_offers_four_reachable_futures(question_type):
    rng = random.Random(0)
    drawn_mechanics = Counter()
    for _ in range(200):
        question = draw_question(rng, question_type)
        scene, ask = question.scene, question.ask
        assert ask is ASKS[question_type]
        assert sorted(question.options) == list("ABCD")
        assert len(set(question.options.values())) == 4
        assert scene.target.cells == simulate(scene.motion, scene.furniture)
        assert question.options[question.answer] == cell_name(scene.target.cells[ask.asked])
        here = scene.target.cells[ask.last]
        (futures,) = [
            group
            for group in counterfactuals(scene.furniture, ask)
            if simulate(next(iter(group.values()))[0], scene.furniture)[ask.last] == here
        ]
        assert {cell(option) for option in question.options.values()} <= set(futures)
        assert all(other.colour != scene.target.colour for other in scene.others)
        drawn_mechanics[scene.furniture.mechanic] += 1
    assert len(drawn_mechanics) >= 4
    assert min(drawn_mechanics.values()) >= 20


def test_mechanics_without_a_question_are_an_error():
    without = [m for m in MECHANICS if not any(counterfactuals(f, ASKS["hop5"]) for f in furnitures(m))]
    if not without:
        pytest.skip("every mechanic can ask hop5")
    with pytest.raises(DataError, match="hop5"):
        draw_question(random.Random(0), "hop5", mechanics=tuple(without))


# ---- pictures and files ---------------------------------------------------------------------------------------------


def test_clips_show_the_steps():
    question = draw_question(random.Random(3), "hop5")
    whole, seen = clip(question.scene), seen_clip(question.scene, question.ask)
    assert whole.shape == (10, 64, 64, 3)
    assert seen.shape == (8, 64, 64, 3)
    assert all((whole[number] == render(question.scene, number - 1)).all() for number in range(1, 9))
    twice = (0, 0, 1, 1, 6, 6, 7, 7)  # one temporal patch of the model a step
    assert all((seen[i] == render(question.scene, step)).all() for i, step in enumerate(twice))


def test_videos_are_h264_and_decode_to_what_was_drawn(world, drawn):
    files = sorted(world.videos.rglob("*.mp4"))
    assert len(files) == sum(COUNTS.values()) == len(drawn)
    rates = {}
    for file in files:
        with av.open(str(file)) as container:
            stream = container.streams.video[0]
            assert (stream.codec_context.name, stream.width, stream.height) == ("h264", 64, 64)
            rates.setdefault(file.parent.name, set()).add(stream.average_rate)
        frames = read_frames(file).frames.astype(int)
        assert frames.shape == drawn[file.name].shape
        error = abs(frames - drawn[file.name])
        assert error.mean() < CODEC_ERROR
        assert (error.max(-1) > 60).mean() < 0.04
    (rate,) = rates["train"]
    assert rates == {"train": {rate}, "perception": {rate}, "test": {2 * rate}}  # where a step is held for two frames


def test_pool_numbers_show_the_steps(world, drawn):
    for record in read(world.sft)[:8]:
        frames = read_frames(world.videos / record["video"], pool=range(1, 9)).frames.astype(int)
        assert abs(frames - drawn[f"{record['id']}.mp4"][1:9]).mean() < CODEC_ERROR


def seen_cell(frame: np.ndarray, colour: str) -> str | None:
    """The cell in which a decoded frame shows a colour, None if nowhere."""
    palette = [*scenes_module.COLOURS.values(), (18, 18, 24), (150, 150, 150), (120, 80, 50), (70, 60, 90)]
    nearest = np.abs(frame[:, :, None].astype(int) - np.array(palette)).sum(-1).argmin(-1)
    where = np.argwhere(nearest == list(scenes_module.COLOURS).index(colour))
    if len(where) < 12:  # edges of other colours bleed into a few pixels
        return None
    y, x = np.median(where, axis=0) + 0.5
    return cell_name((int(x * SIZE / 64), int(y * SIZE / 64)))


def options_of(prompt):
    return dict(line.split(". ") for line in prompt.splitlines() if line[1:3] == ". ")


def test_records_say_what_the_pictures_show(world):
    """Cells in the first thought, the last thought and the answer, read off the decoded frames."""
    for record in [*load_records(world.sft, world.videos), *load_records(world.perception, world.videos)]:
        question = record.question
        words = "\n".join(part.text for part in record.reasoning if isinstance(part, Text))
        *told, final = re.findall(r"\b(?:hidden|[a-d][w-z])\b", words)
        (colour,) = [name for name in scenes_module.COLOURS if f"the {name} " in words]
        seen = read_frames(record.video, pool=record.image).frames
        assert [seen_cell(frame, colour) or "hidden" for frame in seen] == told, record.id
        last = (record.reasoning_image or record.image)[-1]
        assert seen_cell(read_frames(record.video, pool=[last]).frames[0], colour) == final, record.id
        options = options_of(question)
        assert options.get(record.answer, record.answer) == final  # perception answers by letter, sft by text
        assert final in options.values()


def test_test_clips_hold_the_seen_steps_only(world, drawn):
    """Each clip, against the scene of its question: four steps, each held for two frames, and none of the future."""
    scenes = set()
    questions = balanced_questions(random.Random("test 0"), COUNTS["test"], scenes)
    for item, question in zip(read(world.futurebench), questions, strict=True):
        scenes.add(question.scene.key)
        assert item["qa"]["Question"] == question.text
        frames = drawn[f"{item['id']}.mp4"]
        assert len(frames) == read_frames(world.videos / item["video_path"].removeprefix("video_dataset/")).total == 8
        for frame, step in zip(frames, [step for step in question.ask.seen for _ in range(2)], strict=True):
            assert (frame == render(question.scene, step)).all()


# ---- schemas, balance, split ----------------------------------------------------------------------------------------


def test_futurebench_schema(world):
    items = read(world.futurebench)
    assert len(load_items(world.futurebench)) == COUNTS["test"]
    for item in items:
        assert {"id", "video_path", "question_type", "qa"} <= item.keys()
        assert set(item["qa"]) == {"Question", "Options", "Answer"}
        assert item["qa"]["Options"][item["qa"]["Answer"]] == item["meta"]["asked_cell"]
        assert (world.videos / item["video_path"].split("video_dataset/")[1]).is_file()


def test_twiff_schema(world):
    records = load_records(world.sft, world.videos, on_bad="raise")
    assert len(records) == COUNTS["train"]
    for record in records:
        seen, future = [n - 1 for n in record.image], [n - 1 for n in record.reasoning_image]
        (ask,) = [a for a in ASKS.values() if a.seen == tuple(seen) and a.between == tuple(future)]
        assert len(record.reasoning) == 2 * len(ask.between) + 1
        assert [isinstance(part, Frame) for part in record.reasoning] == [
            i % 2 == 1 for i in range(len(record.reasoning))
        ]
        assert record.answer in options_of(record.question).values()
        assert record.question.count("<image>") == 4
    seen_only = load_records(world.perception, world.videos, on_bad="raise")
    assert len(seen_only) == COUNTS["perception"]
    assert not any(record.reasoning_image for record in seen_only)


def test_question_types_and_letters_are_balanced(world):
    tested = Counter((item["question_type"], item["qa"]["Answer"]) for item in read(world.futurebench))
    assert tested == {(name, letter): 2 for name in ASKS for letter in "ABCD"}
    futures = {(ask.seen, ask.between): name for name, ask in ASKS.items()}
    trained = Counter()
    for record in load_records(world.sft, world.videos):
        steps = tuple(n - 1 for n in record.image), tuple(n - 1 for n in record.reasoning_image)
        letters = {text: letter for letter, text in options_of(record.question).items()}
        trained[futures[steps], letters[record.answer]] += 1
    assert trained == {(name, letter): 2 for name in ASKS for letter in "ABCD"}


def test_counts_are_rounded_up_to_keep_the_balance(tmp_path):
    made = make_world(tmp_path / "w", test=1, train=17, progress=False)
    assert len(read(made.futurebench)) == 16
    assert len(read(made.sft)) == 32
    assert not made.perception.exists()
    counts = {"test": 16, "train": 32, "perception": 0}
    assert read(made.manifest) == {**counts, "seed": 0, "read_options": False, "version": world_module.VERSION}


def test_train_and_test_share_no_scene(tmp_path, monkeypatch):
    """Enough questions that chance alone would make them share many."""
    keys = {"test": [], "train": []}
    original_item, original_record = futurebench_item, world_module.sft_record

    def item(question, name, path):
        keys["test"].append(question.scene.key)
        return original_item(question, name, path)

    def record(question, name, path):
        keys["train"].append(question.scene.key)
        return original_record(question, name, path)

    monkeypatch.setattr(world_module, "futurebench_item", item)
    monkeypatch.setattr(world_module, "sft_record", record)
    monkeypatch.setattr(world_module, "write_video", lambda path, frames, fps: None)
    monkeypatch.setattr(scenes_module, "render", lambda scene, step: np.zeros((2, 2, 3), np.uint8))
    make_world(tmp_path, test=480, train=1600, progress=False)
    assert len(keys["test"]) == len(set(keys["test"])) == 480
    assert not set(keys["test"]) & set(keys["train"])
    unlimited = [q.scene.key for q in balanced_questions(random.Random("train 0"), 1600, set())]
    assert len(set(unlimited) & set(keys["test"])) > 20  # without the split they would have met


def test_too_many_test_questions_are_an_error_and_no_endless_loop(monkeypatch):
    monkeypatch.setattr(world_questions, "_TRIES", 300)
    everything = {q.scene.key for q in balanced_questions(random.Random(0), 16, set())}

    class All(set):
        def __contains__(self, key):
            return True

    with pytest.raises(DataError, match="fewer test questions"):
        list(balanced_questions(random.Random(0), 16, All(everything)))


# ---- seeds, kept and broken-off worlds ------------------------------------------------------------------------------


def contents(root):
    return {file.relative_to(root).as_posix(): file.read_bytes() for file in sorted(root.rglob("*")) if file.is_file()}


def test_the_same_seed_gives_the_same_files(world, tmp_path):
    again = make_world(tmp_path / "again", **COUNTS, seed=0, progress=False)
    assert contents(again.root) == contents(world.root)
    other = make_world(tmp_path / "other", test=16, train=16, seed=1, progress=False)
    assert read(other.futurebench) != read(world.futurebench)[:16]
    assert read(other.sft) != read(world.sft)[:16]


def test_a_finished_world_is_kept(world):
    before = {file: file.stat().st_mtime_ns for file in world.root.rglob("*")}
    make_world(world.root, **COUNTS, seed=0, progress=False)
    assert {file: file.stat().st_mtime_ns for file in world.root.rglob("*")} == before


@pytest.mark.parametrize("other", [{"seed": 1}, {"train": 48}, {"perception": 0}])
def test_other_arguments_are_refused(world, other):
    with pytest.raises(DataError, match="Choose another folder"):
        make_world(world.root, **{**COUNTS, "seed": 0, **other}, progress=False)


def break_off(root):
    """Leave the folder as a killed run does: the arguments, some clips, no JSON."""
    small = {"test": 16, "train": 16, "seed": 4, "progress": False}
    made = make_world(root, **small)
    whole = contents(root)
    made.manifest.rename(root / "world.json.part")
    made.sft.unlink()
    gone = sorted(made.videos.rglob("*.mp4"))[5:20]
    for file in gone:
        file.unlink()
    return small, whole, gone


def test_a_broken_off_world_is_completed(tmp_path):
    small, whole, gone = break_off(tmp_path)
    kept = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.mp4")}
    make_world(tmp_path, **small)
    assert contents(tmp_path) == whole
    assert {file: file.stat().st_mtime_ns for file in kept} == kept
    assert all(file.exists() for file in gone)


def test_a_broken_off_world_is_not_completed_with_other_arguments(tmp_path):
    """Its clips would otherwise be shown with another world's questions."""
    small, _, _ = break_off(tmp_path)
    with pytest.raises(DataError, match="Choose another folder"):
        make_world(tmp_path, **{**small, "seed": 5})


def test_clips_of_unknown_arguments_are_drawn_again(tmp_path):
    small, whole, _ = break_off(tmp_path)
    (tmp_path / "world.json.part").unlink()
    stranger = tmp_path / "videos" / "holiday.mp4"
    stranger.write_bytes(b"not ours")
    for file in tmp_path.rglob("micro-*.mp4"):
        file.write_bytes(b"of another world")
    make_world(tmp_path, **small)
    assert stranger.read_bytes() == b"not ours"
    stranger.unlink()
    assert contents(tmp_path) == whole


# ---- nothing to be guessed without the motion -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def exam():
    """1,000 test questions as in a world, and 3,200 others to learn from, as `make_world` draws them; no videos."""
    scenes = set()
    test = []
    for question in balanced_questions(random.Random("test 0"), 1008, scenes):
        scenes.add(question.scene.key)
        test.append(question)
    return test[:1000], list(balanced_questions(random.Random("train 0"), 3200, scenes))


def accuracy(questions, guess) -> float:
    return sum(guess(question) == question.answer for question in questions) / len(questions)


def assert_at_chance(found: float) -> None:
    assert 0.22 <= found <= 0.28, f"a guesser gets {found:.1%} of 1,000 questions; chance is 25%"


def text_of(question) -> str:
    """All words of an item, and words for which cell stands under which letter, alone and by type of question."""
    item = futurebench_item(question, "q", "q.mp4")
    qa = item["qa"]
    words = qa["Question"].replace("?", "").split()
    pairs = [f"{letter}{option}" for letter, option in qa["Options"].items()]
    return " ".join(
        [*words, *qa["Options"].values(), *pairs, *(f"{item['question_type']}{p}" for p in pairs)]
        + [f"{w}{p}" for w in words if w in {*scenes_module.COLOURS, *scenes_module.SHAPES} for p in pairs]
    )


def test_a_bag_of_words_stays_at_chance(exam):
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    test, train = exam
    guesser = make_pipeline(CountVectorizer(binary=True), LogisticRegression(C=0.1, max_iter=300))
    guesser.fit([text_of(q) for q in train], [q.answer for q in train])
    predicted = guesser.predict([text_of(q) for q in test])
    assert_at_chance(np.mean(predicted == [q.answer for q in test]))
    assert set(predicted) == set("ABCD")  # it does not just say one letter


def option_features(question) -> list[list[float]]:
    """For each option: what can be said of its cell and its place among the other three."""
    cells = {letter: np.array(cell(option)) for letter, option in question.options.items()}
    rows = []
    for letter, here in cells.items():
        away = [abs(here - other).sum() for key, other in cells.items() if key != letter]
        rows.append(
            [
                *here,
                "ABCD".index(letter),
                sorted(ASKS).index(question.ask.question_type),
                int(here[0] in (0, SIZE - 1)) + int(here[1] in (0, SIZE - 1)),
                min(away),
                max(away),
                sum(away),
                sum((here == other).any() for other in cells.values()),
            ]
        )
    return rows


def test_an_odd_one_out_scorer_stays_at_chance(exam):
    from sklearn.ensemble import HistGradientBoostingClassifier

    test, train = exam
    x = np.array([row for q in train for row in option_features(q)])
    y = np.array([letter == q.answer for q in train for letter in q.options])
    scorer = HistGradientBoostingClassifier(max_iter=60, max_leaf_nodes=15, random_state=0).fit(x, y)
    scores = scorer.predict_proba(np.array([row for q in test for row in option_features(q)]))[:, 1].reshape(-1, 4)
    assert_at_chance(np.mean([list(q.options)[i] == q.answer for q, i in zip(test, scores.argmax(1), strict=True)]))


def distance(question, letter) -> float:
    """From the option to the last cell seen before the future. Ties are broken by the letter, which is random."""
    return np.abs(np.array(cell(question.options[letter])) - question.scene.target.cells[question.ask.last]).sum()


@pytest.mark.parametrize("choose", [min, max], ids=["nearest", "farthest"])
def test_the_last_seen_cell_does_not_tell(exam, choose):
    assert_at_chance(accuracy(exam[0], lambda q: choose(q.options, key=lambda letter: distance(q, letter))))


def test_standing_still_is_no_good_guess(exam):
    """The option equal to the last seen cell, where there is one."""
    offered = [q for q in exam[0] if any(distance(q, letter) == 0 for letter in q.options)]
    found = accuracy(offered, lambda q: min(q.options, key=lambda letter: distance(q, letter)))
    assert len(offered) > 150
    assert abs(found - 0.25) < 3 * (0.25 * 0.75 / len(offered)) ** 0.5


def test_the_most_frequent_cell_is_no_good_guess(exam):
    test, train = exam
    frequent = {name: Counter() for name in ASKS}
    for question in train:
        frequent[question.ask.question_type][question.options[question.answer]] += 1

    def guess(question):
        return max(question.options, key=lambda letter: frequent[question.ask.question_type][question.options[letter]])

    assert_at_chance(accuracy(test, guess))
