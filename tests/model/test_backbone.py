"""The table of model families: its rows hold in this environment, and no other code names a family."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from transformers.video_utils import VideoMetadata

import future_l1_plugin
from future_l1_plugin.data.showing import encode, processor_media
from future_l1_plugin.errors import CheckpointError
from future_l1_plugin.model import backbone, load
from future_l1_plugin.model.backbone import (
    BACKBONES,
    MEDIA,
    MEDIA_KEYS,
    QWEN3_VL,
    TOKEN_KEYS,
    Ref,
    by_config,
    by_processor,
    by_type,
    core_of,
    placeholder_ids,
    token_types,
)

PACKAGE = Path(future_l1_plugin.__file__).parent


@pytest.fixture(scope="module")
def tiny(tiny_path):
    return load(tiny_path)


def code(path: Path) -> str:
    """A file without comments and docstrings."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            node.body = [one for one in body if not _is_text(one)] or [ast.Pass()]
    return ast.unparse(tree)


def _is_text(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def test_no_other_code_names_a_family():
    """The table of versions does, in words."""
    named = re.compile("|".join(f"{family.model_type}|{family.name.replace('-', '')}" for family in BACKBONES.values()))
    allowed = {PACKAGE / "model/backbone.py", PACKAGE / "compat.py"}
    found = [
        f"{path.relative_to(PACKAGE)}: {line.strip()}"
        for path in sorted(PACKAGE.rglob("*.py"))
        if path not in allowed
        for line in code(path).splitlines()
        if named.search(line)
    ]
    assert not found, "\n".join(found)
    assert named.search(code(PACKAGE / "model/backbone.py"))


@pytest.mark.parametrize("family", BACKBONES.values(), ids=list(BACKBONES))
def test_what_transformers_has_of_a_family(family):
    refs = {name: ref for name, ref in vars(family).items() if isinstance(ref, Ref) and ref.module.startswith("transf")}
    assert set(refs) == {"model", "inner", "config", "processor", "image_processor", "video_processor", "resize"}
    parts = {name: ref.load() for name, ref in refs.items()}
    assert parts["model"].config_class is parts["config"] and parts["config"].model_type == family.model_type
    assert {family.latent_architecture, *family.opening} <= set(family.released)


def test_the_table_loads_no_host():
    hosts = "{'transformers', 'vllm', 'verl'}"
    code = f"import sys, future_l1_plugin.model.backbone; sys.exit(bool({hosts} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_model_and_a_processor_are_found_in_it(tiny):
    model, processor = tiny
    core = core_of(model)
    assert core.family is by_config(model.config) is by_processor(processor) is QWEN3_VL
    assert type(model) is QWEN3_VL.model.load() and type(core.module) is QWEN3_VL.inner.load()
    assert core.vision is model.model.visual and core.text is model.model.language_model
    assert core.width == model.get_input_embeddings().embedding_dim
    assert core_of(nn.ModuleList([model])).module is core.module


def test_the_processor_s_output_has_the_keys_of_the_table(tiny):
    model, processor = tiny
    content = [{"type": "image"}, {"type": "video"}, {"type": "text", "text": "Where?"}]
    messages, frames = [{"role": "user", "content": content}], np.zeros((4, 64, 64, 3), np.uint8)
    text = processor.apply_chat_template(messages, tokenize=False)
    assert text.count(QWEN3_VL.image_text) == text.count(QWEN3_VL.video_text) == 1
    metadata = VideoMetadata(total_num_frames=4, fps=2.0, frames_indices=[0, 1, 2, 3])
    found = encode(processor, messages, processor_media([frames[0]], [(frames, metadata)]))
    assert set(found) == {*TOKEN_KEYS, *MEDIA_KEYS}
    decoded = processor.tokenizer.decode(found["input_ids"][0])
    short = re.sub(rf"({re.escape(QWEN3_VL.video_token)})+", QWEN3_VL.video_token, decoded)
    assert QWEN3_VL.spelled_video(QWEN3_VL.video_times(processor, range(4), 2.0)) in short
    ids, merge = found["input_ids"], model.config.vision_config.spatial_merge_size
    assert torch.equal(token_types(ids, model.config), found["mm_token_type_ids"])
    for media, token in zip(MEDIA, placeholder_ids(model.config), strict=True):
        assert int((ids == token).sum()) == int(found[media.grid].prod(-1).sum()) // merge**2
        assert len(found[media.pixels]) == int(found[media.grid].prod(-1).sum())


def test_what_is_of_no_family_is_refused():
    with pytest.raises(
        CheckpointError, match=r"some/folder: expected model_type 'qwen3_vl', found 'llama'.*Qwen3-VL is"
    ):
        by_type("llama", "some/folder")
    with pytest.raises(CheckpointError, match="expected a processor of Qwen3-VL, found object"):
        by_processor(object())
    with pytest.raises(TypeError, match="Linear: found no Qwen3-VL"):
        core_of(nn.Linear(1, 1))
    assert backbone.NAMES == "Qwen3-VL"
