"""`generate` against a slow, obvious second implementation, and against a teacher-forced pass."""

from contextlib import contextmanager

import numpy as np
import pytest
import torch
from made import picture
from transformers import LogitsProcessor, LogitsProcessorList

from future_l1_plugin.errors import CheckpointError, ConfigError
from future_l1_plugin.evaluation.interventions import Intervention, replayed, split_spans, zeroed
from future_l1_plugin.latent import LatentChannel, SpanBudget, build_policy, latent_mask, spans_of
from future_l1_plugin.model import LatentConfig, generate, load
from future_l1_plugin.model.decode import log_softmax_at

STEPS = 40

RULES = {
    "fixed": {"fixed_latent_budget": True},
    "loose": {"loose_latent_budget": 3},
    "multiplier": {},
}


@contextmanager
def rule_of(model, rule):
    """The model under one of the three budget rules."""
    latent = LatentConfig.from_hf(model.config)
    LatentConfig(**{**vars(latent), **RULES[rule]}).to_hf(model.config)
    try:
        yield
    finally:
        latent.to_hf(model.config)


def endings(out, tokens):
    """How many spans ended by the model's own token, and how many by the budget."""
    ends = [(ids == tokens.end, forced) for ids, forced in zip(out.responses, out.forced, strict=True)]
    return sum(int((e & ~f).sum()) for e, f in ends), sum(int((e & f).sum()) for e, f in ends)


@pytest.fixture(scope="module")
def loaded(tiny_path):
    """A random tiny model in float32, nudged so that rows open spans, close some of them themselves, and stop.

    Which of these happens is the luck of the draw (it changes with the tokenizer and with torch), so heads are drawn
    until the first one under which spans end both ways and rows stop at different lengths. Layers keep their initial
    weights: larger ones let float32 rounding grow beyond 1e-4 over twenty latents, as float64 shows.
    """
    model, processor = load(tiny_path, dtype=torch.float32)
    tokens = LatentConfig.from_hf(model.config).tokens
    inputs = prompts(processor, MIXED)
    for seed in range(30):
        head = 0.3 * torch.randn(model.lm_head.weight.shape, generator=torch.Generator().manual_seed(seed))
        for token, weight in ((tokens.start, 4), (tokens.end, 6), (processor.tokenizer.eos_token_id, 3)):
            head[token] *= weight
        model.lm_head.weight = torch.nn.Parameter(head)  # no longer tied to the embedding
        for rule in ("loose", "multiplier"):
            with rule_of(model, rule):
                out = generate(model, inputs, max_new_tokens=STEPS)
            lengths = [len(row) for row in out.responses]
            if min(endings(out, tokens)) < 3 or not STEPS // 4 <= sorted(lengths)[1] < max(lengths):
                break
        else:
            return model, processor
    raise AssertionError("no head of 30 lets spans end both ways: nudge the model otherwise")


def prompts(processor, rows):
    """rows: list of (text, images, video frames or None) -> one left-padded batch."""
    texts, images, videos, metadata = [], [], [], []
    for text, row_images, video in rows:
        content = [{"type": "image"} for _ in row_images] + ([{"type": "video"}] if video is not None else [])
        content.append({"type": "text", "text": text})
        texts.append(
            processor.apply_chat_template(
                [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
            )
        )
        images += row_images
        if video is not None:
            videos.append(video)
            metadata.append({"fps": 4.0, "frames_indices": list(range(len(video))), "total_num_frames": len(video)})
    more = {}
    if images:
        more["images"] = images
    if videos:
        more |= {"videos": videos, "video_metadata": metadata, "do_sample_frames": False}
    inputs = processor(text=texts, padding=True, padding_side="left", return_tensors="pt", **more)
    inputs.pop("video_metadata", None)
    return inputs


MIXED = [
    ("Where is it?", [], None),
    ("What is this thing here, and where will it be 2 steps later?", [picture(0)], None),
    ("And now?", [picture(1), picture(2, 32, 96)], None),
    ("Where will the red circle be?", [], np.stack([picture(s) for s in (3, 4, 5, 6)])),
    ("Where is the blue square?", [picture(7)], np.stack([picture(s) for s in (8, 9)])),
    ("x", [], np.stack([picture(s, 96, 64) for s in (10, 11, 12)])),
]


def slow_row(model, processor, row, budget, exact, steps):
    """One row, no cache, no batch: embed everything, overwrite latents, run the whole sequence again for each token."""
    tokens = LatentConfig.from_hf(model.config).tokens
    inputs = prompts(processor, [row])
    start = inputs["input_ids"].shape[1]
    ids, latents, logprobs, in_span, held = inputs["input_ids"], [], [], False, 0
    stop = set(model.generation_config.eos_token_id)
    banned = [model.config.image_token_id, model.config.video_token_id]
    for _ in range(steps):
        extra = ids.shape[1] - start
        pass_inputs = dict(inputs, input_ids=ids, attention_mask=torch.ones_like(ids))
        types = inputs["mm_token_type_ids"]
        pass_inputs["mm_token_type_ids"] = torch.cat([types, types.new_zeros(1, extra)], 1)
        seen = {}

        def write(module, args, out, ids=ids, latents=tuple(latents)):
            out = out.clone()
            for position, z in zip((ids[0, start:] == tokens.latent).nonzero()[:, 0] + start, latents, strict=True):
                out[0, position] = z
            return out

        handles = [
            model.model.language_model.embed_tokens.register_forward_hook(write),
            model.model.language_model.norm.register_forward_hook(lambda m, a, o, s=seen: s.update(h=o[0, -1])),
        ]
        with torch.no_grad():
            logits = model(**pass_inputs, use_cache=False).logits[0, -1].float()
        for handle in handles:
            handle.remove()
        logp = logits.log_softmax(-1)
        scores = logits.clone()
        scores[banned] = -torch.inf
        if not in_span:
            scores[[tokens.latent, tokens.end]] = -torch.inf
        own = int(scores.argmax())
        if in_span and held >= budget:
            token, in_span = tokens.end, False
            logprobs.append(0.0)
        elif in_span and not (own == tokens.end and not exact):
            token, held = tokens.latent, held + 1
            latents.append(seen["h"])
            logprobs.append(0.0)
        else:
            token = own
            logprobs.append(float(logp[token]))
            in_span, held = token == tokens.start, 0
        ids = torch.cat([ids, torch.tensor([[token]])], 1)
        if token in stop:
            break
    return ids[0, start:], latents, logprobs


@pytest.mark.parametrize("rule", RULES)
def test_batched_equals_slow_row_by_row(loaded, rule):
    model, processor = loaded
    budget, exact = {"fixed": (4, True), "loose": (3, False), "multiplier": (8, False)}[rule]
    with rule_of(model, rule):
        out = generate(model, prompts(processor, MIXED), max_new_tokens=STEPS)
    for i, row in enumerate(MIXED):
        ids, latents, logprobs = slow_row(model, processor, row, budget, exact, STEPS)
        assert out.responses[i].tolist() == ids.tolist()
        assert len(out.latents[i]) == len(latents)
        if latents:
            torch.testing.assert_close(out.latents[i], torch.stack(latents), atol=1e-4, rtol=0)
        torch.testing.assert_close(out.logprobs[i], torch.tensor(logprobs), atol=1e-4, rtol=0)
    by_token, by_budget = endings(out, LatentConfig.from_hf(model.config).tokens)
    assert by_budget > 0
    assert (by_token == 0) if exact else (by_token > 0)


@pytest.mark.parametrize("policy", [build_policy("deterministic"), build_policy("vmf", mean_cosine=0.9)], ids=str)
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_teacher_forced_pass_gives_back_logprobs_and_mu(loaded, policy, temperature):
    model, processor = loaded
    inputs = prompts(processor, MIXED)
    generator = torch.Generator().manual_seed(0)
    out = generate(
        model, inputs, policy, 40, temperature=temperature, top_p=0.99, generator=generator, record_means=True
    )
    tokens = LatentConfig.from_hf(model.config).tokens
    start, ids = inputs["input_ids"].shape[1], out.sequences
    lengths = torch.tensor([len(r) for r in out.responses])
    alive = torch.arange(ids.shape[1] - start) < lengths[:, None]
    types = inputs["mm_token_type_ids"]
    replay = dict(inputs, input_ids=ids)
    replay["attention_mask"] = torch.cat([inputs["attention_mask"], alive.long()], 1)
    replay["mm_token_type_ids"] = torch.cat([types, types.new_zeros(alive.shape)], 1)
    with torch.no_grad(), LatentChannel(model, tokens) as channel:
        channel.feed(out.latents, start)
        logits = model(**replay).logits.float()[:, start - 1 : -1]
    every = (logits / (temperature or 1.0)).log_softmax(-1)
    logp = every.gather(2, ids[:, start:, None])[..., 0]
    for i, n in enumerate(lengths):
        expected = logp[i, :n].masked_fill(out.forced[i], 0.0)
        torch.testing.assert_close(out.logprobs[i], expected, atol=1e-4, rtol=0)
    assert sum(len(z) for z in out.latents) == int(latent_mask(ids[:, start:], tokens).sum()) > 10
    recorded = torch.cat(out.latents)
    assert [len(mu) for mu in out.means] == [len(p) for p in out.end_logprobs] == [len(z) for z in out.latents]
    torch.testing.assert_close(torch.cat(out.means), channel.mu, atol=1e-4, rtol=0)
    ends = every[..., tokens.end][latent_mask(ids[:, start:], tokens)]
    torch.testing.assert_close(torch.cat(out.end_logprobs), ends, atol=1e-4, rtol=0)
    if policy.stochastic:
        cosine = torch.cosine_similarity(channel.mu, recorded, dim=-1)
        assert 0.8 < float(cosine.mean()) < 0.96
    else:
        torch.testing.assert_close(channel.mu, recorded, atol=1e-4, rtol=0)


def test_the_chance_to_go_on_survives_float32():
    """p(end) = 1 - e^-40 is 1 in float32; log(1 - p(end)) = -40 must come back from its logarithm."""
    end = log_softmax_at(torch.tensor([[0.0, 40.0], [40.0, 0.0], [0.0, 0.0]]), 1)
    torch.testing.assert_close((-end.double().expm1()).log(), torch.tensor([-40.0, 0.0, -np.log(2)]).double())


def test_same_seed_same_rollout_and_rows_differ(loaded):
    """Whether means are recorded or not."""
    model, processor = loaded
    inputs = prompts(processor, [MIXED[0]] * 3)

    def once(**more):
        generator = torch.Generator().manual_seed(5)
        return generate(model, inputs, build_policy("gaussian", sigma=0.5), 30, 1.0, generator=generator, **more)

    first, second = once(), once(record_means=True)
    assert first.means is first.end_logprobs is None
    assert first.text == second.text and len(set(first.text)) > 1
    assert all(torch.equal(a, b) for a, b in zip(first.latents, second.latents, strict=True))


def test_text_keeps_markers_and_streams(loaded):
    model, processor = loaded
    steps = []
    out = generate(model, prompts(processor, MIXED[:2]), max_new_tokens=12, on_token=lambda i, z: steps.append((i, z)))
    assert len(steps) == 12
    assert "<|latent_start|><|latent|>" in "".join(out.text)
    assert sum(int(z.sum()) for _, z in steps) == sum(len(z) for z in out.latents)


class Script(LogitsProcessor):
    """Makes each row propose given tokens, one a step."""

    def __init__(self, rows):
        self.rows, self.step = rows, 0

    def __call__(self, input_ids, scores):
        scores = torch.full_like(scores, -torch.inf)
        for row, script in enumerate(self.rows):
            scores[row, script[self.step]] = 0.0
        self.step += 1
        return scores


def test_a_finished_row_stays_finished(loaded):
    """Whatever it would say behind its end, spans included, is neither written nor recorded."""
    model, processor = loaded
    tokens = LatentConfig.from_hf(model.config).tokens
    eos, pad = processor.tokenizer.eos_token_id, processor.tokenizer.pad_token_id
    z, start, end = tokens.latent, tokens.start, tokens.end
    rows = [[5, eos, start, 6, 6, 6], [start, 6, 6, end, 7, 8], [start, end, eos, start, 6, 6]]
    seen = []
    out = generate(
        model,
        prompts(processor, MIXED[:3]),
        max_new_tokens=6,
        logits_processor=LogitsProcessorList([Script(rows)]),
        on_token=lambda ids, latent: seen.append(latent),
    )
    assert [r.tolist() for r in out.responses] == [[5, eos], [start, z, z, end, 7, 8], [start, end, eos]]
    assert [len(rows) for rows in out.latents] == [0, 2, 0] == torch.stack(seen).sum(0).tolist()
    assert [len(p) for p in out.logprobs] == [len(f) for f in out.forced] == [2, 6, 3]
    assert out.sequences[0, -4:].tolist() == [pad] * 4 and out.sequences[2, -3:].tolist() == [pad] * 3
    assert "<|im_end|>" not in "".join(out.text) and "<|endoftext|>" not in "".join(out.text)


def test_force_initial_latent_mode(loaded):
    model, processor = loaded
    model.config.force_initial_latent_mode = True
    try:
        out = generate(model, prompts(processor, MIXED[:3]), max_new_tokens=6)
    finally:
        model.config.force_initial_latent_mode = False
    tokens = LatentConfig.from_hf(model.config).tokens
    assert all(int(r[0]) == tokens.start and float(p[0]) == 0 for r, p in zip(out.responses, out.logprobs, strict=True))


def test_bad_input(loaded, tmp_path):
    from future_l1_plugin.model import make_tiny

    model, processor = loaded
    inputs = prompts(processor, MIXED[:2])
    with pytest.raises(ConfigError, match="temperature"):
        generate(model, inputs, temperature=-1)
    right = {k: v.flip(1) if k in ("input_ids", "attention_mask") else v for k, v in inputs.items()}
    with pytest.raises(ConfigError, match="left-padded"):
        generate(model, right)
    plain = make_tiny(tmp_path / "plain", latent=False)
    with pytest.raises(CheckpointError, match="future-l1 convert"):
        load(plain)


# ---- budgets and interventions --------------------------------------------------------------------------------------


def test_a_budget_replaces_the_checkpoint_s(loaded):
    model, processor = loaded
    inputs = prompts(processor, MIXED)
    tokens = LatentConfig.from_hf(model.config).tokens
    none = generate(model, inputs, max_new_tokens=STEPS, budget=SpanBudget(0))
    assert sum(len(row) for row in none.latents) == 0
    for ids in none.responses:
        assert all(ids[i + 1] == tokens.end for i in (ids[:-1] == tokens.start).nonzero().flatten())
    two = generate(model, inputs, max_new_tokens=STEPS, budget=SpanBudget(2, exact=True))
    lengths = [n for ids in two.responses for _, n, closed in spans_of(ids.tolist(), tokens) if closed]
    assert lengths and set(lengths) == {2}


def test_replaying_its_own_latents_changes_nothing_and_others_are_fed(loaded):
    """Rows open several spans that end by themselves or by the budget: every place is found again."""
    model, processor = loaded
    inputs = prompts(processor, MIXED)
    tokens = LatentConfig.from_hf(model.config).tokens
    alone = generate(model, inputs, max_new_tokens=STEPS)
    spans = [split_spans(text, z) for text, z in zip(alone.text, alone.latents, strict=True)]
    assert max(map(len, spans)) > 1

    def run(rows):
        policy = Intervention(tokens, rows)
        return generate(model, inputs, max_new_tokens=STEPS, policy=policy, on_token=policy.see)

    again = run([replayed(row) if row else None for row in spans])
    assert again.text == alone.text
    assert all(torch.equal(a, b) for a, b in zip(again.latents, alone.latents, strict=True))

    turned = run([replayed(row[::-1]) if len(row) > 1 else zeroed for row in spans])
    for row, text, latents in zip(spans, turned.text, turned.latents, strict=True):
        expected = row[::-1] if len(row) > 1 else None
        for number, fed in enumerate(split_spans(text, latents)):
            if expected is None:
                assert not fed.any()
            else:
                wanted = expected[number % len(expected)]
                assert torch.equal(fed, torch.stack([wanted[i % len(wanted)] for i in range(len(fed))]))
