"""The installed verl as a reference."""

import pytest


@pytest.fixture(scope="session")
def verl_algorithms():
    """verl's module of advantages and losses. Importing it takes 8 s."""
    from future_l1_plugin.compat import verl_flavour

    if verl_flavour() != "verl":
        pytest.skip("needs upstream verl")
    from verl.trainer.ppo import core_algos

    return core_algos
