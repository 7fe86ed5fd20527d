"""A pass without padding (`train.packing`) against the same pass with it: losses, gradients, and no look at others."""

import pytest
import torch

from future_l1_plugin.data import make_world
from future_l1_plugin.data.record_files import load_records
from future_l1_plugin.data.sft import SftCollator, SftDataset
from future_l1_plugin.model import LatentConfig, load
from future_l1_plugin.model.objective import TEACHER_FORCING, OwnLatents, sft_losses


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    """Four records of different lengths."""
    world = make_world(tmp_path_factory.mktemp("world"), test=0, train=16, seed=0, progress=False)
    found = sorted(load_records(world.sft, world.videos), key=lambda r: (len(r.image), len(r.reasoning_image)))
    return [found[0], found[-1], found[5], found[-2]]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("case", ["images", "video", "own latents", "text only"])
def test_a_packed_pass_is_the_padded_one(tiny_path, records, case, attention):
    if attention == "eager" and case != "images":
        pytest.skip("the mask is made the same way")
    model, processor = load(tiny_path, dtype=torch.float32, attn_implementation=attention)
    config, spans = LatentConfig.from_hf(model.config), case != "text only"
    collate = SftCollator(processor, config, "images" if case == "images" else "video", spans)
    data = SftDataset(records, spans)
    batch = collate([data[i] for i in range(4)])
    assert len(set(batch["attention_mask"].sum(1).tolist())) > 1  # there is padding
    own = OwnLatents(1.0, 2) if case == "own latents" else TEACHER_FORCING
    found = []
    for packing in (False, True):
        model.zero_grad()
        losses = sft_losses(model.train(), config, dict(batch), own, going_on=spans, packing=packing)
        losses.total.backward()
        found.append((losses, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}))
    (padded, gradients), (packed, others) = found
    for name in ("total", "ce", "latent", "going_on"):
        values = [float(getattr(losses, name).detach()) for losses in (packed, padded)]
        assert values[0] == pytest.approx(values[1], abs=1e-5), name
    assert (packed.latents, packed.choices) == (padded.latents, padded.choices)
    assert int(packed.decisions) == int(padded.decisions)
    assert gradients.keys() == others.keys()
    for name, gradient in gradients.items():
        assert torch.allclose(others[name], gradient, rtol=0, atol=1e-4 * float(gradient.abs().max())), name


def test_packing_makes_the_pass_shorter_and_one_row_stays_what_it_is(tiny_path, records):
    model, processor = load(tiny_path, dtype=torch.float32)
    config = LatentConfig.from_hf(model.config)
    data, seen = SftDataset(records), []
    model.model.language_model.norm.register_forward_hook(lambda module, args, out: seen.append(tuple(out.shape[:2])))
    batch = SftCollator(processor, config)([data[i] for i in range(4)])
    sft_losses(model, config, batch, packing=True)
    assert seen == [(1, int(batch["attention_mask"].sum()))] and batch["input_ids"].shape[0] == 4
    alone = SftCollator(processor, config)([data[1]])
    one, other = (sft_losses(model, config, alone, packing=packing) for packing in (True, False))
    assert float(one.total.detach()) == pytest.approx(float(other.total.detach()), abs=1e-6)
