"""Prompt lengths from headers, against the processor's own."""

import numpy as np
import pytest
from PIL import Image

from future_l1_plugin.data import make_world
from future_l1_plugin.data.frame_choice import Evenly
from future_l1_plugin.data.lengths import check_lengths, clip_header, prompt_length
from future_l1_plugin.data.prompt import RlPrompt, encode_prompt
from future_l1_plugin.data.rl import Prompts, load_prompts
from future_l1_plugin.data.video_writer import write_video
from future_l1_plugin.errors import DataError


@pytest.fixture(scope="module")
def processor(tiny_path):
    from transformers import AutoConfig

    from future_l1_plugin.model import LatentConfig
    from future_l1_plugin.model.checkpoint import load_processor

    return load_processor(tiny_path, LatentConfig.from_hf(AutoConfig.from_pretrained(tiny_path)))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    make_world(folder, test=4, train=4, perception=0, seed=3)
    return folder


@pytest.mark.parametrize("media", ["images", "video"])
@pytest.mark.parametrize("file", ["sft.json", "futurebench.json"])
def test_lengths_from_headers_are_those_of_the_encoded_prompts(world, processor, file, media):
    prompts = load_prompts(world / file, world / "videos", media, num_frames=6)
    for prompt in prompts[:12]:
        assert prompt_length(prompt, processor) == len(encode_prompt(prompt, processor).prompt_ids), prompt.id


@pytest.mark.parametrize("shape", [(48, 80, 17), (200, 120, 5), (64, 64, 1)])
@pytest.mark.parametrize("num_frames", [3, 32])
def test_other_shapes_and_frame_counts(tmp_path, processor, shape, num_frames):
    height, width, frames = shape
    path = tmp_path / "clip.mp4"
    write_video(path, np.random.default_rng(0).integers(0, 255, (frames, height, width, 3), dtype=np.uint8), fps=7.5)
    assert clip_header(path).total == frames
    prompt = clip_prompt(path, num_frames)
    assert prompt_length(prompt, processor) == len(encode_prompt(prompt, processor).prompt_ids)


def clip_prompt(path, num_frames=32, **more):
    fields = {"id": "p", "question": "What next?", "media": "video", "ground_truth": "A", "source": "futurebench/hop1"}
    return RlPrompt(**fields | {"video": str(path), "frames": num_frames and Evenly(num_frames)} | more)


def test_pictures_and_text(tmp_path, processor):
    Image.new("RGB", (150, 90)).save(tmp_path / "a.png")
    Image.new("RGB", (64, 200)).save(tmp_path / "b.jpg")
    pictures = clip_prompt(None, None, media="images", images=(str(tmp_path / "a.png"), str(tmp_path / "b.jpg")))
    text = clip_prompt(None, None, media="none", question="1 + 1 = ?")
    for prompt in (pictures, text):
        assert prompt_length(prompt, processor) == len(encode_prompt(prompt, processor).prompt_ids)


def test_the_real_processors_cap_fits_the_full_recipe(tmp_path, processor, repository):
    """32 frames of 1024 x 768, the first 4:3 size that meets the cap of Qwen3-VL's video processor, in pixels."""
    from omegaconf import OmegaConf

    path = tmp_path / "clip.mp4"
    write_video(path, np.zeros((32, 768, 1024, 3), dtype=np.uint8), fps=8)
    recipe = OmegaConf.load(repository / "recipes" / "la_dapo.yaml")
    before = dict(processor.video_processor.size)
    processor.video_processor.size = {"shortest_edge": 4096, "longest_edge": 25165824}  # of the released checkpoints
    try:
        length = prompt_length(clip_prompt(path), processor)
    finally:
        processor.video_processor.size = before
    # 16 temporal patches of 32 x 24 = 768 tokens: 12,288, the cap itself; the rest is times, markers and question.
    assert 12288 < length <= recipe.data.max_prompt_length
    rollout = recipe.actor_rollout_ref.rollout
    assert rollout.max_model_len >= recipe.data.max_prompt_length + recipe.data.max_response_length
    assert recipe.actor_rollout_ref.actor.ppo_max_token_len_per_gpu >= rollout.max_model_len


def test_prompts_that_are_too_long_are_bad_rows(world, processor):
    prompts = load_prompts(world / "futurebench.json", world / "videos", num_frames=6)
    lengths = sorted(prompt_length(prompt, processor) for prompt in prompts)
    most = lengths[len(lengths) // 2]
    kept = check_lengths(prompts, processor, most, "skip")
    assert [p.id for p in kept] == [p.id for p in prompts if prompt_length(p, processor) <= most]
    assert len(kept) + len(kept.bad) == len(prompts)
    with pytest.raises(DataError, match=rf"tokens, data.max_prompt_length is {most}. Do this."):
        check_lengths(prompts, processor, most, "raise", "Do this.")
    with pytest.raises(DataError, match="prompts are bad"):
        check_lengths(prompts, processor, 3, "skip")


def test_a_file_that_is_no_video_is_named(tmp_path, processor):
    (tmp_path / "clip.mp4").write_bytes(b"no video, but some bytes that are not empty at all")
    with pytest.raises(DataError, match=r"prompt p: .*clip\.mp4: cannot be opened as a video"):
        prompt_length(clip_prompt(tmp_path / "clip.mp4"), processor)
    kept = check_lengths(
        Prompts([clip_prompt(None, None, media="none"), clip_prompt(tmp_path / "clip.mp4")]), processor, 900, "skip"
    )
    assert (len(kept), len(kept.bad)) == (1, 1)
