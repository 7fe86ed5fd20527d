"""`policy_loss` with the fields of `LossInputs` as arguments, for tests that change one of them at a time."""

from dataclasses import fields

from future_l1_plugin.la_dapo import LaDapoLoss, LossInputs, policy_loss

_NAMES = [field.name for field in fields(LossInputs)]


def loss_of(settings: LaDapoLoss, *values, **more):
    """(loss, means, maxima)."""
    found = policy_loss(settings, LossInputs(**dict(zip(_NAMES, values, strict=False)), **more))
    return found.loss, found.means, found.maxima
