"""scripts/bench_data.py runs and fills its table. No figure is judged here: machines that run tests are busy."""

import importlib.util

import pytest

pytest.importorskip("decord")


@pytest.fixture(scope="module")
def bench(repository):
    spec = importlib.util.spec_from_file_location("bench_data", repository / "scripts" / "bench_data.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_it_prints_every_row(bench, tiny_path, capsys):
    small = ["--model", str(tiny_path), "--records", "16", "--batch", "2", "--turns", "1", "--workers", "1"]
    assert bench.main(small) == 0
    rows = [line.split("|") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert [row[1].split(",")[0].strip() for row in rows[1:]] == ["frames per second", "SFT step", "SFT step"]
    assert all(cell.strip() for row in rows for cell in row[1:-1])
    assert bench.main([*small, "--only", "frames"]) == 0
    assert "SFT step" not in capsys.readouterr().out


def test_the_plain_loop_reads_the_frames_that_we_read(bench, tiny_path, tmp_path):
    from transformers import AutoProcessor

    from future_l1_plugin.data import load_records, make_world

    world = make_world(tmp_path, test=16, train=16, progress=False)
    records = list(load_records(world.sft, world.videos))[:3]
    shown = []

    class Seen:
        def __init__(self, processor):
            self.processor = processor

        def __call__(self, text, images, **more):
            shown.append(images)
            return self.processor(text=text, images=images, **more)

    texts = {
        r.id: "<|vision_start|><|image_pad|><|vision_end|>" * (len(r.image) + len(r.reasoning_image)) for r in records
    }
    bench.plain_loop(records, Seen(AutoProcessor.from_pretrained(tiny_path)), texts)
    from future_l1_plugin.data.sft import SftDataset

    for sample, images in zip(SftDataset(records), shown, strict=True):
        ours = [*sample.question_clip.frames, *sample.future.frames]
        assert len(ours) == len(images) and all((a == b).all() for a, b in zip(ours, images, strict=True))
