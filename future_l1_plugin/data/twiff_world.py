"""A micro TwiFF-Bench: held-out questions of a micro world in TwiFF-Bench's schema, with their pictures."""

import io
import json
from pathlib import Path

from PIL import Image

from future_l1_plugin.data.scenes import render
from future_l1_plugin.data.world import VERSION, World
from future_l1_plugin.data.world_questions import held_out_questions, sft_record
from future_l1_plugin.errors import DataError
from future_l1_plugin.journal import atomic_write


def make_twiffbench(world: str | Path, items: int) -> Path:
    """Draw the first `items` test questions of a finished micro world into its folder twiffbench/.

    Its test.jsonl, written last, has the scenes and order of futurebench.json. The reference tells the seen cells,
    shows the frames in between and ends with the cell asked for, as training records do; the class is the mechanic.
    Files that are there already stay as they are.

    Returns that folder, for TWIFFBENCH_DATA.

    Raises:
        DataError: no finished world of this version there, or fewer test questions.
    """
    manifest = World(Path(world)).manifest
    if not manifest.is_file():
        raise DataError(f"{manifest}: expected a finished micro world, found none. Make it: future-l1 world {world}")
    size = json.loads(manifest.read_text())
    if size["version"] != VERSION or not 1 <= items <= size["test"]:
        raise DataError(
            f"{world}: a world of version {size['version']} with {size['test']} test questions; expected version "
            f"{VERSION}, and 1 to {size['test']} as the number of TwiFF-Bench items, found {items}"
        )
    folder = Path(world) / "twiffbench"
    (folder / "images").mkdir(parents=True, exist_ok=True)
    rows = []
    for i, question in enumerate(held_out_questions(size["seed"], items)):
        name, scene, ask = f"micro-test-{i:05d}", question.scene, question.ask
        files = {step: f"images/{name}-{step}.png" for step in (*ask.seen, *ask.between)}
        for step, file in files.items():
            _write(folder / file, render(scene, step))
        record = sft_record(question, name, f"test/{name}.mp4")
        human, gpt = (turn["value"] for turn in record["conversations"])
        rows.append(
            {
                "id": name,
                "video": record["video"],
                "question": human,
                "answer": f"{gpt.replace('<image>', '<rimage>')}<ans>{record['answer']}</ans>",
                "question_images": [files[step] for step in ask.seen],
                "question_images_index": record["image"],
                "reasoning_images": [files[step] for step in ask.between],
                "reasoning_images_index": record["reasoning_image"],
                "meta_data": {"classification": scene.furniture.mechanic},
            }
        )
    with atomic_write(folder / "test.jsonl") as file:
        file.writelines(json.dumps(row).encode() + b"\n" for row in rows)
    return folder


def _write(file: Path, picture) -> None:
    """Write a picture, unless it is there: whoever keeps answers by the files' times then finds them again."""
    png = io.BytesIO()
    Image.fromarray(picture).save(png, "png")
    if not file.exists() or file.read_bytes() != png.getvalue():
        file.write_bytes(png.getvalue())
