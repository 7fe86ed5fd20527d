"""`sft_losses` against an obvious second implementation: no channel, everything written out, torch's own losses."""

import dataclasses
import os
import signal
import subprocess
import sys

import pytest
import torch
from torch.nn.functional import cosine_similarity, cross_entropy, mse_loss

from future_l1_plugin.data import make_world
from future_l1_plugin.data.record_files import load_records
from future_l1_plugin.data.records import Frame
from future_l1_plugin.data.sft import IGNORED, SftCollator, SftDataset
from future_l1_plugin.latent.channel import HEAD_NAME
from future_l1_plugin.latent.heads import build_head
from future_l1_plugin.model import LatentConfig, generate, load
from future_l1_plugin.model.objective import OwnLatents, latent_targets, own_latents, sft_losses


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"), test=16, train=16, progress=False)


@pytest.fixture(scope="module")
def records(world):
    """Four records with different numbers of future frames."""
    found = sorted(load_records(world.sft, world.videos), key=lambda r: len(r.reasoning_image))
    chosen = [found[0], found[-1], found[1], found[-2]]
    assert len({len(r.reasoning_image) for r in chosen}) > 1
    return chosen


@pytest.fixture()
def model(tiny_path):
    """Everything trainable, the vision tower too: what must not get a gradient is up to the objective."""
    return load(tiny_path, dtype=torch.float32)[0].train()


@pytest.fixture(scope="module")
def processor(tiny_path):
    return load(tiny_path)[1]


def settings(model, **changes):
    return dataclasses.replace(LatentConfig.from_hf(model.config), **changes)


def collate(processor, config, records, media="images", spans=True):
    data = SftDataset(records, spans=spans)
    return SftCollator(processor, config, question_media=media, spans=spans)([data[i] for i in range(len(records))])


def without_frames(record):
    return dataclasses.replace(record, reasoning=tuple(p for p in record.reasoning if not isinstance(p, Frame)))


def by_hand(model, config, batch, pool=None, head=None, detach=True, fed=None):
    """(cross-entropy, latent loss, e*) from the definitions. pool: (n, H) -> (budget, H); fed: inputs other than e*."""
    core = model.model
    future = core.get_image_features(batch["latent_pixel_values"], batch["latent_grid_thw"], return_dict=True)
    stars = torch.cat([pool(frame) if pool else frame for frame in future.pooler_output])
    stars = stars.detach() if detach else stars
    hidden, mu = pass_by_hand(model, config, batch, stars if fed is None else fed, head)
    logits = model.lm_head(hidden)
    ce = cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=IGNORED)
    latent = {
        "mse": lambda: mse_loss(mu, stars),
        "sum_mse": lambda: sum(((m - e) ** 2).sum() for m, e in zip(mu, stars, strict=True)) / len(stars),
        "cosine": lambda: 1 - cosine_similarity(mu, stars).mean(),
    }[config.latent_loss]()
    return ce, latent, stars


def latent_places(config, batch):
    """(row, column) of each latent, in reading order."""
    ids, starts = batch["input_ids"], batch["response_start"].tolist()
    return [
        (row, c)
        for row, start in enumerate(starts)
        for c in range(start, ids.shape[1])
        if ids[row, c] == config.latent_id
    ]


def pass_by_hand(model, config, batch, fed, head=None):
    """(hidden states (B, T, H), mu (sum k_i, H)) of one whole pass that is fed these latents."""
    ids, core = batch["input_ids"], model.model
    video = "pixel_values_videos" in batch
    kind = ("pixel_values_videos", "video_grid_thw") if video else ("pixel_values", "image_grid_thw")
    see = core.get_video_features if video else core.get_image_features
    seen = see(batch[kind[0]], batch[kind[1]], return_dict=True)
    pads = ids == (model.config.video_token_id if video else model.config.image_token_id)

    embeddings = core.get_input_embeddings()(ids)
    embeddings = embeddings.masked_scatter(pads[..., None], torch.cat(list(seen.pooler_output)))
    rows, columns = torch.tensor(latent_places(config, batch)).T
    embeddings = embeddings.index_put((rows, columns), fed)
    positions, _ = core.get_rope_index(
        ids,
        mm_token_type_ids=batch["mm_token_type_ids"],
        attention_mask=batch["attention_mask"],
        **{kind[1]: batch[kind[1]]},
    )
    hidden = core.language_model(
        inputs_embeds=embeddings,
        attention_mask=batch["attention_mask"],
        position_ids=positions,
        visual_pos_masks=pads,
        deepstack_visual_embeds=seen.deepstack_features,
    ).last_hidden_state
    mu = hidden[rows, columns - 1]
    return hidden, head(mu) if head else mu


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def assert_same_gradients(found, expected):
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], atol=1e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


CASES = {
    "mse": {},
    "sum_mse": {"latent_loss": "sum_mse", "latent_lambda": 0.01},
    "cosine": {"latent_loss": "cosine", "latent_lambda": 1.0},
    "no weight": {"latent_lambda": 0.0},
    "video": {},
}


@pytest.mark.parametrize("case", CASES)
def test_losses_and_gradients(model, processor, records, case):
    config = settings(model, **CASES[case])
    batch = collate(processor, config, records, media="video" if case == "video" else "images")
    losses = sft_losses(model, config, batch)
    ce, latent, stars = by_hand(model, config, batch)
    torch.testing.assert_close(losses.ce, ce, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(losses.latent, latent, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(losses.total, ce + config.latent_lambda * latent, atol=1e-5, rtol=1e-5)
    assert losses.latents == len(stars) == 4 * sum(len(r.reasoning_image) for r in records)
    assert_same_gradients(
        gradients(model, losses.total), gradients(model, ce + config.latent_lambda * latent)
    )  # of text, vision and merger: e* is data, the question's frames are not


def test_targets_are_data(model, processor, records):
    """Nothing flows into the vision tower through the future frames, neither as targets nor as inputs."""
    config = settings(model)
    batch = collate(processor, config, records)
    assert not any(row.requires_grad for row in latent_targets(model, config, batch))
    batch["latent_pixel_values"].requires_grad_()
    latent = gradients(model, sft_losses(model, config, batch).latent)
    assert batch["latent_pixel_values"].grad is None
    # The check has teeth: with targets that carry gradients the vision tower's would be others.
    leaky = gradients(model, by_hand(model, config, batch, detach=False)[1])
    name = next(n for n in latent if "visual" in n and "merger" in n and n.endswith("weight"))
    assert not torch.allclose(latent[name], leaky[name], atol=1e-5, rtol=1e-2)


@pytest.mark.parametrize("budget", [1, 2, 4, 6])
def test_fixed_budget_pools_each_frame(model, processor, records, budget):
    config = settings(model, train_fixed_latent_budget=budget)
    batch = collate(processor, config, records)

    def pool(frame):  # windows of raster order; 4 features into 1, 2, 4, or repeated into 6
        windows = {1: [(0, 4)], 2: [(0, 2), (2, 4)], 4: [(i, i + 1) for i in range(4)]}
        windows[6] = [(0, 1), (0, 2), (1, 2), (2, 3), (2, 4), (3, 4)]
        return torch.stack([frame[a:b].mean(0) for a, b in windows[budget]])

    losses = sft_losses(model, config, batch)
    ce, latent, stars = by_hand(model, config, batch, pool)
    assert losses.latents == len(stars) == budget * sum(len(r.reasoning_image) for r in records)
    torch.testing.assert_close(losses.ce, ce, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(losses.latent, latent, atol=1e-5, rtol=1e-5)


def test_rows_without_future_frames_among_others(model, processor, records):
    config = settings(model)
    mixed = [without_frames(records[0]), records[1], without_frames(records[2]), records[3]]
    batch = collate(processor, config, mixed)
    assert (batch["latent_frames"] == 0).tolist() == [True, False, True, False]
    losses = sft_losses(model, config, batch)
    ce, latent, _ = by_hand(model, config, batch)
    torch.testing.assert_close(torch.stack([losses.ce, losses.latent]), torch.stack([ce, latent]), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("how", ["text only", "records without frames"])
@pytest.mark.parametrize("head", [False, True])
def test_a_batch_without_future_frames(model, processor, records, how, head):
    if head:
        setattr(model, HEAD_NAME, build_head("lvr", 128))
    config = settings(model, use_projection_head=head, projection_head_type="lvr")
    rows = records if how == "text only" else [without_frames(r) for r in records]
    batch = collate(processor, config, rows, spans=how != "text only")
    losses = sft_losses(model, config, batch)
    assert losses.latents == 0 and float(losses.latent.detach()) == 0.0
    assert torch.equal(losses.total, losses.ce)
    zero = gradients(model, sft_losses(model, config, batch).latent)  # on the graph: every rank has the same gradients
    assert zero and all(not g.any() for g in zero.values())
    assert any("layers.3" in name for name in zero) and any(HEAD_NAME in name for name in zero) is head


def test_a_head_is_trained_by_the_latent_loss(model, processor, records):
    torch.manual_seed(0)
    head = build_head("lvr", 128)
    setattr(model, HEAD_NAME, head)
    config = settings(model, use_projection_head=True, projection_head_type="lvr")
    batch = collate(processor, config, records)
    losses = sft_losses(model, config, batch)
    ce, latent, _ = by_hand(model, config, batch, head=head)
    torch.testing.assert_close(losses.latent, latent, atol=1e-5, rtol=1e-5)
    found = gradients(model, losses.total)
    assert_same_gradients(found, gradients(model, ce + config.latent_lambda * latent))
    assert sum(HEAD_NAME in name for name in found) == 6


def test_a_peft_wrapped_model_has_the_same_losses(model, processor, records):
    from peft import LoraConfig, get_peft_model

    config = settings(model)
    batch = collate(processor, config, records)
    expected = sft_losses(model, config, batch)
    wrapped = get_peft_model(model, LoraConfig(r=4, target_modules=r".*language_model.*\.(q_proj|v_proj)"))
    losses = sft_losses(wrapped, config, batch)
    for name in ("ce", "latent", "total"):
        torch.testing.assert_close(getattr(losses, name), getattr(expected, name), atol=1e-6, rtol=1e-6)
    found = gradients(wrapped, losses.total)
    assert found and all("lora_" in name for name in found)


# ---- the choice to go on ---------------------------------------------------------------------------------------------


def choices_by_hand(model, config, batch, fed, at):
    """(-log(1 - p(end)), -log p(latent)) one position before each latent of `at`, its number among all latents."""
    hidden, _ = pass_by_hand(model, config, batch, fed)
    places = [latent_places(config, batch)[i] for i in at]
    p = torch.stack([model.lm_head(hidden[row, c - 1]).softmax(-1) for row, c in places])
    return -(1 - p[:, config.latent_end_id]).log(), -p[:, config.latent_id].log()


@pytest.mark.parametrize("limit", [8, 3])
def test_going_on_is_trained_beside_the_text(model, processor, records, limit):
    """Spans of 4 latents; a budget of 3 forces the end behind the third, so the fourth is nobody's choice."""
    config = settings(model, loose_latent_budget=limit)
    batch = collate(processor, config, records)
    losses = sft_losses(model, config, batch, going_on=True)
    text, latent, stars = by_hand(model, config, batch)
    kept, named = choices_by_hand(model, config, batch, stars, [i for i in range(len(stars)) if i % 4 < limit])
    words = int((batch["labels"][:, 1:] != IGNORED).sum())
    ce = (text * words + named.sum()) / (words + len(named))
    assert losses.choices == len(kept) == len(stars) * min(limit, 4) // 4 and losses.decisions == words + len(kept)
    torch.testing.assert_close(losses.going_on, kept.mean(), atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(losses.ce, ce, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(losses.total, ce + config.latent_lambda * latent, atol=1e-5, rtol=1e-5)
    found = gradients(model, losses.total)
    assert_same_gradients(found, gradients(model, ce + config.latent_lambda * latent))


def test_going_on_with_own_latents(model, processor, records):
    config = settings(model)
    batch = collate(processor, config, records)
    losses = sft_losses(model, config, batch, OwnLatents(1.0, 2), torch.Generator(), going_on=True)
    fed = own_latents(model, config, batch, 2)
    kept, _ = choices_by_hand(model, config, batch, fed, range(len(fed)))
    torch.testing.assert_close(losses.going_on, kept.mean(), atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("case", ["fixed budget", "no future frames", "not asked for"])
def test_where_going_on_is_no_choice_nothing_changes(model, processor, records, case):
    config = settings(model, fixed_latent_budget=case == "fixed budget")
    batch = collate(processor, config, records, spans=case != "no future frames")
    plain = sft_losses(model, config, batch)
    losses = sft_losses(model, config, batch, going_on=case != "not asked for")
    assert torch.equal(losses.total, plain.total) and losses.choices == 0 and not losses.going_on.any()
    assert losses.decisions == (batch["labels"][:, 1:] != IGNORED).sum()
    found, expected = gradients(model, losses.total), gradients(model, plain.total)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


# ---- e* in the precision of the model's own pass ---------------------------------------------------------------------


def test_under_autocast_targets_are_computed_as_the_question_is(model, processor, records, monkeypatch):
    """flash-attention takes no float32. And weights cast for a pass without gradients must not serve the next one."""
    from transformers.models.qwen3_vl import modeling_qwen3_vl as modeling

    config = settings(model)
    batch = collate(processor, config, records)
    seen, attend = [], modeling.Qwen3VLVisionAttention.forward

    def watched(self, hidden_states, *args, **kwargs):
        seen.append(self.qkv(hidden_states).dtype)
        return attend(self, hidden_states, *args, **kwargs)

    monkeypatch.setattr(modeling.Qwen3VLVisionAttention, "forward", watched)
    autocast = lambda: torch.autocast("cpu", torch.bfloat16)  # noqa: E731
    model.forward = autocast()(model.forward)  # as accelerate does
    losses = sft_losses(model, config, batch, OwnLatents(0.5, 2), torch.Generator(), autocast=autocast)
    layers = len(model.model.visual.blocks)
    assert seen == [torch.bfloat16] * 3 * layers  # e*, the own latents' prompt, the pass with gradients
    found = gradients(model, losses.total)
    # The second implementation, in one go: e* and own latents are those of the passes above, so only noise differs.
    del model.forward
    exact = gradients(model, sft_losses(model, config, batch, OwnLatents(0.5, 2), torch.Generator()).total)
    assert found.keys() == exact.keys()
    for name, gradient in exact.items():
        if gradient.norm() > 1e-3:
            assert cosine_similarity(found[name].flatten(), gradient.flatten(), dim=0) > 0.95, name


# ---- own latents as inputs -------------------------------------------------------------------------------------------


@torch.no_grad()
def decoded_by_hand(model, config, batch, head=None, latents=None):
    """Own latents one after the other, as decoding makes them: (sum k_i, H). Stops after `latents` of each row."""
    places = latent_places(config, batch)
    number = [sum(row == other for other, _ in places[:i]) for i, (row, _) in enumerate(places)]  # within its row
    fed = torch.zeros(len(places), 128)
    for step in range(max(number) + 1 if latents is None else latents):
        mu = pass_by_hand(model, config, batch, fed, head)[1]
        fed = torch.where(torch.tensor(number)[:, None] == step, mu, fed)
    return fed, torch.tensor(number)


@pytest.mark.parametrize("media", ["images", "video"])
@pytest.mark.parametrize("with_head", [False, True])
def test_own_latents_follow_from_each_other(model, processor, records, media, with_head):
    torch.manual_seed(0)
    if with_head:
        setattr(model, HEAD_NAME, build_head("lvr", 128))
    head = getattr(model, HEAD_NAME, None)
    config = settings(model, use_projection_head=with_head, projection_head_type="lvr")
    batch = collate(processor, config, records, media=media)
    expected, number = decoded_by_hand(model, config, batch, head)
    most = int(number.max()) + 1
    assert most == 12
    torch.testing.assert_close(own_latents(model, config, batch, most), expected, atol=1e-4, rtol=1e-4)
    for passes in (1, 3):  # the first so many are exact, further ones not yet
        found = own_latents(model, config, batch, passes)
        torch.testing.assert_close(found[number < passes], expected[number < passes], atol=1e-4, rtol=1e-4)
        assert not torch.allclose(found[number == passes], expected[number == passes], atol=1e-3, rtol=1e-3)
        assert not found.requires_grad


def test_own_latents_are_those_of_decoding(tiny_path, processor, records):
    model = load(tiny_path, dtype=torch.float32, fixed_latent_budget=True, force_initial_latent_mode=True)[0]
    config = LatentConfig.from_hf(model.config)
    row = collate(processor, config, records[:1], media="video")
    start = int(row["response_start"])
    prompt = {key: row[key][:, :start] for key in ("input_ids", "attention_mask", "mm_token_type_ids")}
    media = {key: row[key] for key in ("pixel_values_videos", "video_grid_thw")}
    decoded = generate(model, prompt | media, max_new_tokens=12, tokenizer=processor.tokenizer)
    ids = decoded.sequences
    batch = media | {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": torch.nn.functional.pad(prompt["mm_token_type_ids"], (0, ids.shape[1] - start)),
        "response_start": row["response_start"],
    }
    assert len(decoded.latents[0]) >= 4
    found = own_latents(model, config, batch, len(decoded.latents[0]))
    torch.testing.assert_close(found, decoded.latents[0], atol=1e-4, rtol=1e-4)


def test_own_latents_do_not_see_the_future(model, processor, records):
    config = settings(model)
    batch = collate(processor, config, records)
    found = own_latents(model, config, batch, 2)
    for key in ("latent_pixel_values", "latent_grid_thw", "labels"):
        del batch[key]
    assert torch.equal(own_latents(model, config, batch, 2), found)


def test_losses_on_own_latents(model, processor, records):
    """share 1: the inputs are data (no gradient flows back through them), the targets stay e*."""
    config = settings(model)
    batch = collate(processor, config, records)
    losses = sft_losses(model, config, batch, OwnLatents(1.0, 3), torch.Generator())
    ce, latent, _ = by_hand(model, config, batch, fed=own_latents(model, config, batch, 3))
    torch.testing.assert_close(torch.stack([losses.ce, losses.latent]), torch.stack([ce, latent]), atol=1e-5, rtol=1e-5)
    found = gradients(model, losses.total)
    assert_same_gradients(found, gradients(model, ce + config.latent_lambda * latent))
    teacher = sft_losses(model, config, batch)
    assert abs(float((teacher.latent - losses.latent).detach())) > 1e-3


def test_a_share_of_the_rows_gets_own_latents(model, processor, records):
    config = settings(model)
    batch = collate(processor, config, records)
    stars, own = latent_targets(model, config, batch), own_latents(model, config, batch, 2)
    own = own.split([len(row) for row in stars])
    kinds = set()
    for seed in range(6):
        found = sft_losses(model, config, batch, OwnLatents(0.5, 2), torch.Generator().manual_seed(seed))
        again = sft_losses(model, config, batch, OwnLatents(0.5, 2), torch.Generator().manual_seed(seed))
        assert torch.equal(found.total, again.total)
        drawn = torch.rand(len(stars), generator=torch.Generator().manual_seed(seed)) < 0.5
        fed = torch.cat([a if mine else b for a, b, mine in zip(own, stars, drawn.tolist(), strict=True)])
        ce, latent, _ = by_hand(model, config, batch, fed=fed)
        torch.testing.assert_close(
            torch.stack([found.ce, found.latent]), torch.stack([ce, latent]), atol=1e-5, rtol=1e-5
        )
        kinds.add(tuple(drawn.tolist()))
    assert len(kinds) > 2


def test_own_latents_are_drawn_around_mu(model, processor, records):
    config = settings(model)
    batch = collate(processor, config, records * 4)
    mu = own_latents(model, config, batch, 1)
    drawn = own_latents(model, config, batch, 1, 0.9, torch.Generator().manual_seed(0))
    torch.testing.assert_close(drawn.norm(dim=-1), mu.norm(dim=-1))
    cosines = cosine_similarity(drawn, mu)
    assert cosines.mean() == pytest.approx(0.9, abs=0.01) and cosines.std() > 1e-3
    assert torch.equal(own_latents(model, config, batch, 1, 0.9, torch.Generator().manual_seed(0)), drawn)
    # Drawn in each pass, the last draw behind the others: latent 2 follows from the drawn latent 1.
    assert not torch.equal(own_latents(model, config, batch, 2, 0.9, torch.Generator().manual_seed(0)), drawn)


def test_gradient_checkpointing_and_training_mode_change_no_own_latent(model, processor, records):
    """transformers drops the cache of a model that trains with gradient checkpointing."""
    config = settings(model)
    batch = collate(processor, config, records)
    expected = own_latents(model, config, batch, 2)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.model.visual.eval()
    torch.testing.assert_close(own_latents(model, config, batch, 2), expected, atol=1e-6, rtol=1e-6)
    assert model.training and model.model.language_model.layers[0].training  # as they were before
    assert not model.model.visual.training
    model.gradient_checkpointing_disable()


@pytest.mark.parametrize("how", ["text only", "records without frames", "one record without frames"])
def test_own_latents_of_rows_without_future_frames(model, processor, records, how):
    """Ranks of a distributed run must make equally many passes, whatever their rows hold."""
    config = settings(model)
    passes = []
    handle = model.register_forward_hook(lambda *_: passes.append(1))
    if how == "one record without frames":
        batch = collate(processor, config, [without_frames(records[0]), *records[1:]])
    else:
        rows = records if how == "text only" else [without_frames(r) for r in records]
        batch = collate(processor, config, rows, spans=how != "text only")
    losses = sft_losses(model, config, batch, OwnLatents(1.0, 3), torch.Generator())
    handle.remove()
    assert len(passes) == 1 + 3 + 1
    if how == "one record without frames":
        expected = by_hand(model, config, batch, fed=own_latents(model, config, batch, 3))[0]
    else:
        expected = sft_losses(model, config, batch).ce
    torch.testing.assert_close(losses.ce, expected, atol=1e-5, rtol=1e-5)


# ---- ranks that wait for each other ---------------------------------------------------------------------------------


def without_pictures(record):
    return dataclasses.replace(record, question=record.question.replace("<image>", ""), image=[])


def bare(record):
    return without_frames(without_pictures(record))


#: Micro-batches that two ranks may hold at a time.
BATCHES = {
    "pictures and future frames": lambda records: records[:2],
    "no future frames": lambda records: [without_frames(record) for record in records[:2]],
    "no pictures": lambda records: [without_pictures(record) for record in records[:2]],
    "neither": lambda records: [bare(record) for record in records[:2]],
    "one of each": lambda records: [bare(records[0]), records[1]],
}


def calls(model, run) -> list[str]:
    """Names of the modules that hold weights, in the order in which their forward and backward passes begin.

    These are the moments at which ZeRO-3 and FSDP gather weights, all ranks together: before a module's forward pass,
    and when the gradient of its output is there.
    """
    order, handles = [], []

    def watch(name, module):
        def ends(module, args, output):
            if output.requires_grad:
                output.register_hook(lambda _: order.append(f"{name}'"))

        handles.append(module.register_forward_pre_hook(lambda *_: order.append(name)))
        handles.append(module.register_forward_hook(ends))

    for name, module in model.named_modules():
        if list(module.parameters(recurse=False)):
            watch(name, module)
    run()
    for handle in handles:
        handle.remove()
    return order


@pytest.mark.parametrize("train_vision", [False, True])
@pytest.mark.parametrize("media", ["images", "video"])
def test_every_batch_makes_the_same_passes_in_the_same_order(model, processor, records, media, train_vision):
    config, own = settings(model), OwnLatents(0.5, 2)
    setattr(model, HEAD_NAME, build_head("lvr", model.config.text_config.hidden_size))
    model.model.visual.requires_grad_(train_vision)
    orders = {}
    for name, chosen in BATCHES.items():
        if media == "video" and name not in ("pictures and future frames", "no future frames"):
            continue  # check_records leaves none of the others
        batch = collate(processor, config, chosen(records), media)
        step = lambda batch=batch: sft_losses(model, config, batch, own, torch.Generator()).total.backward()  # noqa: E731
        orders[name] = calls(model, step)
    first = orders["pictures and future frames"]
    assert first.count("model.visual.patch_embed.proj") == 3  # e*, the own latents' prompt, the pass with gradients
    assert first.count("lm_head") == 4 and ("model.visual.merger.linear_fc1'" in first) is train_vision
    for name, order in orders.items():
        assert order == first, name


def test_a_blank_picture_changes_nothing(model, processor, records):
    config = settings(model)
    batch = collate(processor, config, BATCHES["neither"](records))
    losses = sft_losses(model, config, batch)
    ours = ("latent_", "blank_", "response_start", "record_ids")
    plain = model(**{key: value for key, value in batch.items() if not key.startswith(ours)}).loss
    assert torch.equal(losses.ce, plain) and not losses.latent.any()
    losses.total.backward()
    gradients = [p.grad for p in model.model.visual.parameters()]
    assert all(gradient is not None and not gradient.any() for gradient in gradients)


RANKS = """
import datetime, sys
import torch
import torch.distributed as dist
from future_l1_plugin.model import LatentConfig, load
from future_l1_plugin.model.objective import OwnLatents, sft_losses

dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=20))
model, _ = load(sys.argv[1], dtype=torch.float32)
batch = torch.load(sys.argv[2 + dist.get_rank()])
config = LatentConfig.from_hf(model.config)

def gather(number):
    def hook(*_):  # stands for the gathering of a module's weights: every rank's numbers, which must be one
        numbers = [torch.zeros(1, dtype=torch.long) for _ in range(2)]
        dist.all_gather(numbers, torch.tensor([number]))
        assert numbers[0] == numbers[1], f"rank {dist.get_rank()} is at module {number}, the ranks are at {numbers}"
    return hook

def ends(number):
    def hook(module, args, output):
        if output.requires_grad:
            output.register_hook(gather(-number))
    return hook

for number, module in enumerate(model.modules()):
    if list(module.parameters(recurse=False)):
        module.register_forward_pre_hook(gather(number))
        module.register_forward_hook(ends(number))
losses = sft_losses(model, config, batch, OwnLatents(0.5, 2), torch.Generator().manual_seed(0))
losses.total.backward()
dist.barrier()
print("done", flush=True)
"""


def test_two_ranks_with_unlike_records_do_not_wait_for_each_other(tiny_path, processor, records, tmp_path):
    """Over gloo, with a collective operation before each module, as under ZeRO-3."""
    config = LatentConfig.from_hf(load(tiny_path)[0].config)
    names = ("pictures and future frames", "neither")
    files = [tmp_path / f"{rank}.pt" for rank in range(2)]
    for file, name in zip(files, names, strict=True):
        torch.save(collate(processor, config, BATCHES[name](records)), file)
    (tmp_path / "ranks.py").write_text(RANKS)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, tmp_path / "ranks.py", tiny_path, *files]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with (tmp_path / "said").open("w") as said:
        ranks = subprocess.Popen(command, env=environment, stdout=said, stderr=said, start_new_session=True)
    try:
        code = ranks.wait(timeout=90)
    finally:
        if ranks.poll() is None:  # ranks that wait for each other: torchrun's death alone would not end them
            os.killpg(ranks.pid, signal.SIGKILL)
    said = (tmp_path / "said").read_text()
    assert code == 0 and said.count("done") == 2, said[-3000:]
