"""The LA-DAPO loss: by hand, against finite differences, and against the installed verl where there are no latents."""

import math

import pytest
import torch
from la_dapo_losses import loss_of

from future_l1_plugin.errors import ConfigError
from future_l1_plugin.la_dapo import LaDapoLoss, Tempering, latent_kl, latent_log_prob
from future_l1_plugin.latent import build_policy

NAN, INF = math.nan, math.inf
NO_KL = LaDapoLoss(kl_weight=0.0, latent_kl_weight=0.0)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


# By hand. Two responses; each has two tokens, two latents, and one position that nothing is known about.
#                 tokens           latents        outside
RATIO = [[1.5, 1.1, 1.05, 1.2, NAN], [0.5, 4.0, 0.8, 5.0, INF]]
#: Advantages +1 and -2. Clip ranges [0.8, 1.28] and [0.9, 1.1], dual clip 3:
#:   tokens  A = +1:  -min(1.5, 1.28) = -1.28 (high)    -1.1
#:           A = -2:  2 max(0.5, 0.8) = 1.6 (low)       2 min(4, 3) = 6 (dual)    sum 5.22, mean 1.305
#:   latents A = +1:  -1.05                             -min(1.2, 1.1) = -1.1 (high)
#:           A = -2:  2 max(0.8, 0.9) = 1.8 (low)       2 * 5 = 10 (no dual)      sum 9.65, mean 2.4125
TEXT, LATENT = 1.305, 2.4125
#: Reference over new probability 2, 1/2, 1, 4. k3 = r - log r - 1: 0.306853 + 0.193147 + 0 + 1.613706, mean 0.528426.
REF_RATIO = [[2.0, 0.5, NAN, -1.0, NAN], [1.0, 4.0, INF, 0.0, NAN]]
KL_TEXT = (2 + 0.5 + 1 + 4 - 4 - math.log(4)) / 4
KL_LATENT = (1 + 2 + 3 + 4) / 4
#: d loss / d log_prob = -A r / 4 where nothing is cut, times the weight 0.5 for latents.
GRADIENT = [[0.0, -1.1 / 4, -0.5 * 1.05 / 4, 0.0, 0.0], [0.0, 0.0, 0.0, 0.5 * 10 / 4, 0.0]]


def by_hand(dtype=torch.float64):
    old = torch.tensor([[-1.0, -2.0, 900.0, 901.0, NAN], [-0.5, -3.0, 902.0, 900.5, 0.0]], dtype=dtype)
    log_prob = (old + torch.tensor(RATIO, dtype=dtype).log()).requires_grad_()
    return {
        "log_prob": log_prob,
        "old_log_prob": old,
        "advantages": torch.tensor([[1.0, 1, 1, 1, NAN], [-2.0, -2, -2, -2, INF]]),
        "text_mask": torch.tensor([[True, True, False, False, False]] * 2),
        "latent_mask": torch.tensor([[False, False, True, True, False]] * 2),
        "num_text": 4,
        "num_latents": 4,
        "ref_log_prob": log_prob.detach() + torch.tensor(REF_RATIO, dtype=dtype).log(),
        "latent_kl": torch.tensor([[NAN, INF, 1.0, 2.0, NAN], [NAN, NAN, 3.0, 4.0, INF]], dtype=dtype).requires_grad_(),
        "entropy": torch.tensor([[0.5, 1.5, NAN, NAN, NAN], [2.0, 0.0, NAN, NAN, NAN]]),
    }


def test_defaults_are_the_papers():
    assert LaDapoLoss() == LaDapoLoss(
        clip_low=0.2,
        clip_high=0.28,
        dual_clip=3.0,
        latent_clip_low=0.1,
        latent_clip_high=0.1,
        latent_dual_clip=None,
        latent_weight=0.5,
        kl_weight=0.01,
        latent_kl_weight=0.01,
        entropy_weight=0.0,
    )


def test_value_by_hand():
    loss, metrics, maxima = loss_of(LaDapoLoss(), **by_hand())
    assert loss.shape == () and loss.dtype == torch.float64 and loss.requires_grad
    assert float(loss.detach()) == pytest.approx(TEXT + 0.5 * LATENT + 0.01 * KL_TEXT + 0.01 * KL_LATENT, rel=1e-12)
    expected = {
        "text/pg_loss": TEXT,
        "text/ratio": (1.5 + 1.1 + 0.5 + 4) / 4,
        "text/clip_low": 0.25,
        "text/clip_high": 0.25,
        "text/dual_clip": 0.25,
        "text/kl_old": -math.log(1.5 * 1.1 * 0.5 * 4) / 4,
        "text/kl_ref": KL_TEXT,
        "text/entropy": 1.0,
        "latent/pg_loss": LATENT,
        "latent/ratio": (1.05 + 1.2 + 0.8 + 5) / 4,
        "latent/clip_low": 0.25,
        "latent/clip_high": 0.25,
        "latent/dual_clip": 0.0,
        "latent/kl_old": -math.log(1.05 * 1.2 * 0.8 * 5) / 4,
        "latent/kl_ref": KL_LATENT,
    }
    assert {key: float(value) for key, value in metrics.items()} == pytest.approx(expected, rel=1e-12)
    assert {key: float(value) for key, value in maxima.items()} == pytest.approx(
        {"text/ratio_gap": 3.0, "latent/ratio_gap": 4.0}
    )
    assert not any(value.requires_grad for value in (*metrics.values(), *maxima.values()))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"dual_clip": None}, TEXT + 2 / 4 + 0.5 * LATENT),  # 8 in place of 6
        ({"latent_dual_clip": 3.0}, TEXT + 0.5 * (LATENT - 4 / 4)),  # 6 in place of 10
        ({"latent_weight": 0.0}, TEXT),
        ({"latent_weight": 2.0}, TEXT + 2 * LATENT),
        ({"clip_high": 0.6}, TEXT - 0.22 / 4 + 0.5 * LATENT),  # 1.5 is inside: -1.5
        ({"clip_low": 0.4}, TEXT - 2 * 0.2 / 4 + 0.5 * LATENT),  # max(0.5, 0.6)
        ({"latent_clip_high": 0.15}, TEXT + 0.5 * (LATENT - 0.05 / 4)),  # -1.15
        ({"latent_clip_low": 0.3}, TEXT + 0.5 * (LATENT - 2 * 0.1 / 4)),  # 0.8 is inside
        ({"kl_weight": 0.5}, TEXT + 0.5 * LATENT + 0.5 * KL_TEXT),
        ({"latent_kl_weight": 0.5}, TEXT + 0.5 * LATENT + 0.5 * KL_LATENT),
        ({"entropy_weight": 0.25}, TEXT + 0.5 * LATENT - 0.25 * 1.0),  # (0.5 + 1.5 + 2 + 0) / 4
    ],
)
def test_each_setting_by_hand(changes, expected):
    settings = LaDapoLoss(**{"kl_weight": 0.0, "latent_kl_weight": 0.0} | changes)
    loss, metrics, _ = loss_of(settings, **by_hand())
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-12)
    # A KL that is given is reported, whatever its weight.
    assert float(metrics["text/kl_ref"]) == pytest.approx(KL_TEXT)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_gradient_by_hand_and_nothing_leaks_from_outside_the_masks(dtype):
    # NaN and infinity stand outside the masks of every argument.
    inputs = by_hand(dtype)
    loss_of(LaDapoLoss(kl_weight=0.0), **inputs)[0].backward()
    torch.testing.assert_close(inputs["log_prob"].grad, torch.tensor(GRADIENT, dtype=dtype), rtol=1e-4, atol=1e-6)
    expected = torch.tensor([[0, 0, 0.01 / 4, 0.01 / 4, 0]] * 2, dtype=dtype)
    torch.testing.assert_close(inputs["latent_kl"].grad, expected)
    # With the tokens' KL: d k3 / d log_prob = 1 - r_ref.
    inputs = by_hand(dtype)
    loss_of(LaDapoLoss(), **inputs)[0].backward()
    added = torch.tensor([[1 - 2.0, 1 - 0.5, 0, 0, 0], [0, 1 - 4.0, 0, 0, 0]], dtype=dtype) * 0.01 / 4
    expected = torch.tensor(GRADIENT, dtype=dtype) + added
    torch.testing.assert_close(inputs["log_prob"].grad, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("ratio", "advantage", "low", "high", "dual"),
    [
        (1.5, 1.0, 0, 1, 0),
        (1.5, -1.0, 0, 0, 0),  # too likely and bad: the gradient stays
        (0.5, -1.0, 1, 0, 0),
        (0.5, 1.0, 0, 0, 0),  # too unlikely and good: the gradient stays
        (4.0, -1.0, 0, 0, 1),
        (4.0, 0.0, 0, 0, 0),
    ],
)
def test_which_end_of_the_clip_range_cuts(ratio, advantage, low, high, dual):
    mask, none, zero = torch.ones(1, 1, dtype=torch.bool), torch.zeros(1, 1, dtype=torch.bool), torch.zeros(1, 1)
    log_prob = torch.full((1, 1), math.log(ratio), requires_grad=True)
    loss, metrics, _ = loss_of(NO_KL, log_prob, zero, zero + advantage, mask, none, 1, 0)
    loss.backward()
    assert [float(metrics[f"text/{key}"]) for key in ("clip_low", "clip_high", "dual_clip")] == [low, high, dual]
    assert (float(log_prob.grad) == 0) is (low + high + dual > 0 or advantage == 0)


def test_old_and_reference_count_as_data():
    inputs = by_hand()
    for key in ("old_log_prob", "advantages", "ref_log_prob"):
        inputs[key].requires_grad_()
    loss_of(LaDapoLoss(), **inputs)[0].backward()
    assert all(inputs[key].grad is None for key in ("old_log_prob", "advantages", "ref_log_prob"))


def test_large_log_densities_are_subtracted_before_anything_else():
    # In float32 14620.37 and 14620.37 + 1e-4 are the same number.
    old = torch.tensor([[14620.37]], dtype=torch.float64)
    mask, none = torch.ones(1, 1, dtype=torch.bool), torch.zeros(1, 1, dtype=torch.bool)
    for shift in (1e-4, -0.01):
        _, metrics, maxima = loss_of(NO_KL, old + shift, old, torch.ones(1, 1), none, mask, 0, 1)
        assert float(metrics["latent/ratio"]) == pytest.approx(math.exp(shift), rel=1e-10)
        assert float(maxima["latent/ratio_gap"]) == pytest.approx(abs(math.expm1(shift)), rel=1e-6)


def test_log_ratios_are_cut_at_twenty_and_k3_at_ten():
    mask, none = torch.ones(1, 1, dtype=torch.bool), torch.zeros(1, 1, dtype=torch.bool)
    for sign, expected in ((1.0, -1.28), (-1.0, math.exp(20))):
        log_prob = torch.tensor([[500.0]], requires_grad=True)
        settings = LaDapoLoss(dual_clip=None, kl_weight=0.0)
        loss, _, _ = loss_of(settings, log_prob, torch.zeros(1, 1), torch.full((1, 1), sign), mask, none, 1, 0)
        loss.backward()
        assert float(loss.detach()) == pytest.approx(expected, rel=1e-5) and float(log_prob.grad) == 0
    settings = LaDapoLoss(kl_weight=1.0)
    zero = torch.zeros(1, 1)
    assert float(loss_of(settings, zero, zero, zero, mask, none, 1, 0, ref_log_prob=zero + 9)[0]) == 10
    assert float(loss_of(settings, zero, zero, zero, mask, none, 1, 0, ref_log_prob=zero - 9)[0]) == pytest.approx(
        9 - 1 + math.exp(-9), rel=1e-6
    )


# Micro-batches, ranks, and batches without one or the other kind of action


def random_case(b=6, t=9, dtype=torch.float64, spread=0.3):
    generator = seeded(11)
    kind = torch.randint(0, 3, (b, t), generator=generator)
    text_mask, latent_mask = kind == 0, kind == 1
    text_mask[2], latent_mask[2] = kind[2] < 2, False  # a response without latents

    def normal():
        return torch.randn(b, t, generator=generator, dtype=torch.float64).to(dtype)

    old = normal() - 2
    return {
        "log_prob": (old + spread * normal()).requires_grad_(),
        "old_log_prob": old,
        "advantages": normal(),
        "text_mask": text_mask,
        "latent_mask": latent_mask,
        "num_text": float(text_mask.sum()),
        "num_latents": float(latent_mask.sum()),
        "ref_log_prob": old + spread * normal(),
        "latent_kl": normal().square().requires_grad_(),
    }


def test_micro_batches_add_up():
    whole = random_case()
    loss, metrics, maxima = loss_of(LaDapoLoss(), **whole)
    loss.backward()
    gradient = whole["log_prob"].grad.clone()
    whole["log_prob"].grad = None
    losses, sums, tops = [], dict.fromkeys(metrics, 0.0), dict.fromkeys(maxima, 0.0)
    for rows in ([0, 1], [2], [3, 4, 5]):  # the second has no latent
        part = {key: value[rows] if isinstance(value, torch.Tensor) else value for key, value in whole.items()}
        share, its_metrics, its_maxima = loss_of(LaDapoLoss(), **part)
        share.backward()
        losses.append(float(share.detach()))
        sums = {key: sums[key] + float(its_metrics[key]) for key in sums}
        tops = {key: max(tops[key], float(its_maxima[key])) for key in tops}
    assert sum(losses) == pytest.approx(float(loss.detach()), rel=1e-12)
    assert sums == pytest.approx({key: float(value) for key, value in metrics.items()}, rel=1e-12)
    assert tops == {key: float(value) for key, value in maxima.items()}
    torch.testing.assert_close(whole["log_prob"].grad, gradient)


def test_latents_do_not_dilute_the_tokens_and_the_other_way_round():
    case = random_case()
    both = loss_of(LaDapoLoss(), **case)[0]
    none = torch.zeros_like(case["text_mask"])
    text = loss_of(LaDapoLoss(), **case | {"latent_mask": none, "num_latents": 0})[0]
    latent = loss_of(LaDapoLoss(), **case | {"text_mask": none, "num_text": 0})[0]
    assert float(both.detach()) == pytest.approx(float(text.detach() + latent.detach()), rel=1e-12)


def test_without_latents_the_latent_part_is_zero_and_differentiable():
    case = random_case() | {"num_latents": 0}
    case["latent_mask"] = torch.zeros_like(case["text_mask"])
    loss, metrics, maxima = loss_of(LaDapoLoss(), **case)
    assert {float(value) for key, value in metrics.items() if key.startswith("latent/")} == {0.0}
    assert float(maxima["latent/ratio_gap"]) == 0
    loss.backward()
    assert torch.equal(case["latent_kl"].grad, torch.zeros_like(case["latent_kl"]))
    assert (case["log_prob"].grad != 0).any() and (case["log_prob"].grad[~case["text_mask"]] == 0).all()
    # A batch without latents needs no KL of latents.
    assert torch.equal(loss_of(LaDapoLoss(), **case | {"latent_kl": None})[0], loss)


def test_nothing_at_all_is_a_zero_on_the_graph():
    for shape in ((2, 3), (0, 3), (2, 0)):
        log_prob, none = torch.ones(shape, requires_grad=True), torch.zeros(shape, dtype=torch.bool)
        filler = torch.full(shape, NAN)
        loss, metrics, _ = loss_of(
            LaDapoLoss(), log_prob, filler, filler, none, none, 0, 0, ref_log_prob=filler, latent_kl=filler
        )
        loss.backward()
        assert float(loss.detach()) == 0 and all(float(value) == 0 for value in metrics.values())
        assert torch.equal(log_prob.grad, torch.zeros(shape))


def test_half_precision_is_widened():
    case = random_case(dtype=torch.bfloat16)
    loss, _, _ = loss_of(LaDapoLoss(), **case)
    wide = {key: v.detach().float() if torch.is_tensor(v) and v.is_floating_point() else v for key, v in case.items()}
    assert loss.dtype == torch.float32
    assert float(loss.detach()) == pytest.approx(float(loss_of(LaDapoLoss(), **wide)[0]), rel=1e-6)


# Finite differences


def test_gradients_by_finite_differences():
    case = random_case(b=3, t=6)
    rest = {key: value for key, value in case.items() if key not in ("log_prob", "latent_kl")}
    settings = LaDapoLoss(kl_weight=0.7, latent_kl_weight=0.3, latent_dual_clip=1.2, dual_clip=1.3)

    def loss(log_prob, kl):
        return loss_of(settings, log_prob=log_prob, latent_kl=kl, **rest)[0]

    assert torch.autograd.gradcheck(loss, (case["log_prob"], case["latent_kl"]))


@pytest.mark.parametrize("rule", ["none", "sqrt_dim"])
@pytest.mark.parametrize(("name", "kwargs"), [("vmf", {"kappa": 9.0}), ("gaussian", {"sigma": 0.5})])
def test_gradients_through_the_policies(name, kwargs, rule):
    """From mu and the tokens' logits to the loss, as a host puts it together."""
    policy, rule, d = build_policy(name, **kwargs), Tempering(rule), 5
    latent_mask = torch.tensor([[False, True, True, False], [True, False, False, False]])
    text_mask = torch.tensor([[True, False, False, True], [False, True, True, False]])
    generator = seeded(2)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    old_mu, reference, advantages, old_logits = normal(3, d), normal(3, d), normal(2, 1).expand(2, 4), normal(2, 4, 7)
    z, ids = policy.sample(old_mu, generator), torch.randint(0, 7, (2, 4, 1), generator=generator)

    def log_probs(mu, logits):
        text = logits.log_softmax(-1).gather(-1, ids)[..., 0]
        return text.masked_scatter(latent_mask, latent_log_prob(policy, mu, z, rule))

    old = log_probs(old_mu, old_logits)
    settings = LaDapoLoss(kl_weight=0.3, latent_kl_weight=0.2)

    def loss(mu, logits):
        kl = torch.zeros(2, 4, dtype=torch.float64).masked_scatter(latent_mask, latent_kl(policy, mu, reference, rule))
        new = log_probs(mu, logits)
        return loss_of(
            settings, new, old, advantages, text_mask, latent_mask, 4, 3, ref_log_prob=old - 0.1, latent_kl=kl
        )[0]

    mu, logits = (old_mu + 0.01 * normal(3, d)).requires_grad_(), (old_logits + 0.1).requires_grad_()
    assert torch.autograd.gradcheck(loss, (mu, logits), eps=1e-6, atol=1e-7, rtol=1e-5)
    loss(mu, logits).backward()
    assert (mu.grad != 0).all()


# Against verl


@pytest.mark.parametrize("clips", [(0.2, 0.28, 3.0), (0.2, 0.2, 1.5), (0.1, 0.5, 10.0)])
def test_without_latents_equals_verl(verl_algorithms, clips):
    from verl.workers.config import ActorConfig

    low, high, dual = clips
    config = ActorConfig(
        strategy="fsdp",
        rollout_n=1,
        ppo_micro_batch_size_per_gpu=1,
        clip_ratio=low,
        clip_ratio_low=low,
        clip_ratio_high=high,
        clip_ratio_c=dual,
    )
    case = random_case(b=16, t=40, dtype=torch.float32, spread=0.8)
    mask = case["text_mask"] | case["latent_mask"]
    log_prob = case["log_prob"]
    expected, theirs = verl_algorithms.compute_policy_loss_vanilla(
        case["old_log_prob"], log_prob, case["advantages"], mask.float(), "token-mean", config
    )
    kl = verl_algorithms.kl_penalty(log_prob, case["ref_log_prob"], "low_var_kl")
    kl = verl_algorithms.agg_loss(kl, mask.float(), "token-mean")
    (gradient,) = torch.autograd.grad(expected + 0.01 * kl, log_prob)

    case |= {"text_mask": mask, "latent_mask": torch.zeros_like(mask), "num_text": float(mask.sum()), "num_latents": 0}
    settings = LaDapoLoss(clip_low=low, clip_high=high, dual_clip=dual)
    loss, metrics, _ = loss_of(settings, **case)
    assert float(loss.detach()) == pytest.approx(float((expected + 0.01 * kl).detach()), abs=1e-6)
    torch.testing.assert_close(torch.autograd.grad(loss, log_prob)[0], gradient, rtol=1e-5, atol=1e-8)
    ours = {key: float(value) for key, value in metrics.items()}
    assert ours["text/clip_low"] + ours["text/clip_high"] == pytest.approx(theirs["actor/pg_clipfrac"], abs=1e-6)
    assert ours["text/dual_clip"] == pytest.approx(theirs["actor/pg_clipfrac_lower"], abs=1e-6)
    assert ours["text/kl_old"] == pytest.approx(theirs["actor/ppo_kl"], abs=1e-6)
    assert ours["text/clip_low"] > 0.1 and ours["text/clip_high"] > 0.05  # the case reaches the clip ranges


# What is refused


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"clip_low": 0.0}, r"clip_low: expected a number in \(0, 1\], found 0\.0"),
        ({"clip_low": 1.2}, r"clip_low: expected a number in \(0, 1\], found 1\.2"),
        ({"latent_clip_low": "0.1"}, r"latent_clip_low: expected a number in \(0, 1\], found '0\.1'"),
        ({"clip_high": 0}, r"clip_high: expected a number above 0, found 0"),
        ({"latent_clip_high": INF}, r"latent_clip_high: expected a number above 0, found inf"),
        ({"dual_clip": 1.0}, r"dual_clip: expected a number above 1, or null to switch it off, found 1\.0"),
        ({"latent_dual_clip": -3.0}, r"latent_dual_clip: expected a number above 1"),
        ({"latent_weight": -0.5}, r"latent_weight: expected a number of at least 0, found -0\.5"),
        ({"kl_weight": NAN}, r"kl_weight: expected a number of at least 0, found nan"),
        ({"latent_kl_weight": None}, r"latent_kl_weight: expected a number of at least 0, found None"),
        ({"entropy_weight": -0.1}, r"entropy_weight: expected a number of at least 0, found -0\.1"),
        ({"kl_weight": True}, r"kl_weight: expected a number of at least 0, found True"),
    ],
)
def test_bad_settings(changes, message):
    with pytest.raises(ConfigError, match=message):
        LaDapoLoss(**changes)


def test_missing_kl():
    case = random_case()
    with pytest.raises(ConfigError, match=r"entropy_weight=0\.1 needs entropy, found none"):
        loss_of(LaDapoLoss(entropy_weight=0.1), **case | {"entropy": None})
    with pytest.raises(ConfigError, match=r"kl_weight=0\.01 needs ref_log_prob, found none. Enable the reference"):
        loss_of(LaDapoLoss(), **case | {"ref_log_prob": None})
    with pytest.raises(ConfigError, match=r"latent_kl_weight=0\.01 needs latent_kl, .* or set latent_kl_weight to 0"):
        loss_of(LaDapoLoss(), **case | {"latent_kl": None})
    loss, metrics, _ = loss_of(NO_KL, **case | {"ref_log_prob": None, "latent_kl": None})
    assert loss.isfinite() and not {"text/kl_ref", "latent/kl_ref", "text/entropy"} & set(metrics)


def test_bad_masks_and_counts():
    case = random_case()
    overlap = case["text_mask"].clone()
    row, position = case["latent_mask"].nonzero()[0].tolist()
    overlap[row, position] = True
    with pytest.raises(ValueError, match=rf"row {row}, position {position} is in text_mask and in latent_mask"):
        loss_of(LaDapoLoss(), **case | {"text_mask": overlap})
    with pytest.raises(TypeError, match=r"text_mask: expected torch\.bool, found torch\.int64; convert"):
        loss_of(LaDapoLoss(), **case | {"text_mask": case["text_mask"].long()})
    for key in ("num_text", "num_latents"):
        for count in (0, -1, NAN, INF):
            with pytest.raises(ValueError, match=rf"{key}: expected the number of positions .* above 0, found {count}"):
                loss_of(LaDapoLoss(), **case | {key: count})


def test_bad_shapes():
    case = random_case()
    for key in ("old_log_prob", "advantages", "ref_log_prob", "latent_kl", "text_mask", "latent_mask"):
        with pytest.raises(
            ValueError, match=rf"la_dapo {key}: expected the shape of log_prob, \(6, 9\), found \(6, 8\)"
        ):
            loss_of(LaDapoLoss(), **case | {key: case[key][:, :8]})
    with pytest.raises(ValueError, match=r"entropy: expected the shape of log_prob"):
        loss_of(LaDapoLoss(), entropy=torch.zeros(6), **case)
    for log_prob in (torch.zeros(3), torch.zeros(6, 9).long()):
        with pytest.raises(ValueError, match=r"log_prob: expected floating \(B, T\), found"):
            loss_of(LaDapoLoss(), **case | {"log_prob": log_prob})
