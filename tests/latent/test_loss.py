"""The latent loss and the pooling of its targets against numbers worked out by hand."""

import pytest
import torch

from future_l1_plugin.errors import ConfigError
from future_l1_plugin.latent.loss import latent_loss, pool_targets

MU = [[1.0, 2.0], [3.0, 4.0], [0.0, 2.0]]
TARGET = [[1.0, 0.0], [4.0, 3.0], [0.0, -1.0]]
# Squared distances 4, 2, 9; cosines 1/sqrt(5), 24/25, -1.
EXPECTED = {"sum_mse": 15 / 3, "mse": 15 / 6, "cosine": (3 - 5**-0.5 - 0.96 + 1) / 3}


@pytest.mark.parametrize("kind", EXPECTED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_by_hand(kind, dtype):
    loss = latent_loss(torch.tensor(MU, dtype=dtype), torch.tensor(TARGET, dtype=dtype), kind)
    assert loss.shape == () and loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert float(loss) == pytest.approx(EXPECTED[kind], rel=1e-6)


def test_default_is_the_released_mse():
    assert float(latent_loss(torch.tensor(MU), torch.tensor(TARGET))) == 2.5


def test_sum_in_float32_for_half_precision_inputs():
    # 4096 squares of 1/16: in bfloat16 the running sum would stop growing at 16.
    mu = torch.full((1, 4096), 0.25, dtype=torch.bfloat16)
    assert float(latent_loss(mu, torch.zeros_like(mu), "sum_mse")) == 256.0


def test_gradients_by_hand():
    for kind, expected in (("sum_mse", 2 / 3), ("mse", 1 / 3)):
        mu = torch.tensor(MU, requires_grad=True)
        target = torch.tensor(TARGET, requires_grad=True)
        latent_loss(mu, target, kind).backward()
        torch.testing.assert_close(mu.grad, expected * (mu - target).detach())
        assert target.grad is None


@pytest.mark.parametrize("kind", EXPECTED)
def test_gradients_by_finite_differences(kind):
    mu, target = torch.tensor(MU, dtype=torch.float64, requires_grad=True), torch.tensor(TARGET, requires_grad=True)
    assert torch.autograd.gradcheck(lambda m: latent_loss(m, target, kind), mu)
    latent_loss(mu, target, kind).backward()
    assert target.grad is None


@pytest.mark.parametrize("kind", EXPECTED)
def test_nothing_to_supervise_is_a_zero_on_the_graph(kind):
    weight = torch.ones(5, 4, requires_grad=True)
    hidden = torch.randn(3, 5) @ weight
    loss = latent_loss(hidden[:0], torch.empty(0, 4), kind)
    assert loss.dtype == torch.float32 and float(loss.detach()) == 0
    loss.backward()
    assert torch.equal(weight.grad, torch.zeros(5, 4))


def test_bad_losses():
    with pytest.raises(ConfigError, match="expected one of mse, sum_mse, cosine, found 'l1'"):
        latent_loss(torch.ones(1, 2), torch.ones(1, 2), "l1")
    with pytest.raises(ValueError, match=r"found \(3, 2\), \(1, 2\)"):
        latent_loss(torch.ones(3, 2), torch.ones(1, 2))
    with pytest.raises(ValueError, match=r"one shape \(K, H\), found \(2,\)"):
        latent_loss(torch.ones(2), torch.ones(2))


COLUMN = [1.0, 2.0, 4.0, 8.0, 16.0]


@pytest.mark.parametrize(
    ("budget", "expected"),
    [
        (1, [31 / 5]),
        (2, [(1 + 2 + 4) / 3, (4 + 8 + 16) / 3]),  # windows overlap where the budget does not divide n
        (4, [1.5, 3.0, 6.0, 12.0]),
        (5, COLUMN),
        (7, [1.0, 1.5, 3.0, 4.0, 6.0, 12.0, 16.0]),  # windows 0-0, 0-1, 1-2, 2-2, 2-3, 3-4, 4-4
    ],
)
def test_pooling_by_hand(budget, expected):
    tokens = torch.tensor([COLUMN, COLUMN[::-1]]).T  # the second feature runs backwards: features must not mix
    pooled = pool_targets(tokens, budget)
    torch.testing.assert_close(pooled, torch.tensor([expected, pool_reversed(budget)]).T)


def pool_reversed(budget: int) -> list[float]:
    """The rule of the docstring, term by term, on the reversed column."""
    column, n = COLUMN[::-1], len(COLUMN)
    windows = [column[j * n // budget : -(-(j + 1) * n // budget)] for j in range(budget)]
    return [sum(window) / len(window) for window in windows]


def test_pooling_keeps_dtype_and_averages_in_float32():
    tokens = torch.tensor([[256.0], [1.0], [1.0], [1.0], [1.0], [256.0]], dtype=torch.bfloat16)
    pooled = pool_targets(tokens, 2)
    assert pooled.dtype == torch.bfloat16
    assert torch.equal(pooled, torch.tensor([[86.0], [86.0]], dtype=torch.bfloat16))


def test_bad_pooling():
    with pytest.raises(ConfigError, match="train_fixed_latent_budget: expected at least 1, found 0"):
        pool_targets(torch.ones(3, 2), 0)
    for tokens in (torch.ones(0, 2), torch.ones(3), torch.ones(1, 3, 2)):
        with pytest.raises(ValueError, match="expected features of shape"):
            pool_targets(tokens, 2)


def test_a_loss_is_added_in_one_place(monkeypatch):
    """As the package's README says: recipes and checkpoints then know it by its name."""
    from future_l1_plugin.latent import loss
    from future_l1_plugin.model import LatentConfig

    monkeypatch.setitem(loss.LOSSES, "l1", lambda mu, target: (mu - target).abs().mean())
    mu, target = torch.tensor([[1.0, 2.0]]), torch.tensor([[0.0, 4.0]])
    assert float(latent_loss(mu, target, "l1")) == 1.5
    assert LatentConfig(latent_id=1, latent_start_id=2, latent_end_id=3, latent_loss="l1").latent_loss == "l1"
