"""Which engine decodes which rollouts: by their place, whatever the load."""

import asyncio

import pytest

pytest.importorskip("verl")

from future_l1_plugin.integrations.verl.waves import WaveClient, deal


def test_prompts_are_dealt_in_turn_and_every_wave_is_whole():
    assert deal("train-3-0", prompts=5, n=4, engines=2) == [
        {"id": "train-3-0-0", "size": 12, "position": 0, "engine": 0},
        {"id": "train-3-0-1", "size": 8, "position": 0, "engine": 1},
        {"id": "train-3-0-0", "size": 12, "position": 1, "engine": 0},
        {"id": "train-3-0-1", "size": 8, "position": 1, "engine": 1},
        {"id": "train-3-0-0", "size": 12, "position": 2, "engine": 0},
    ]


def test_one_engine_or_any_of_them_decodes_one_wave():
    places = [{"id": "val-0-1", "size": 6, "position": i} for i in range(2)]
    assert deal("val-0-1", prompts=2, n=3, engines=1) == [place | {"engine": 0} for place in places]
    assert deal("val-0-1", prompts=2, n=3, engines=None) == [place | {"engine": None} for place in places]


def test_fewer_prompts_than_engines_leave_some_idle():
    assert [place["size"] for place in deal("train-1-2", prompts=1, n=8, engines=4)] == [8]


def test_the_client_sends_a_request_where_its_wave_is_decoded():
    client = WaveClient(config=None, servers={"a:1": "first", "b:1": "second"})

    def ask(engine):
        params = {"latent": {"wave": {"engine": engine}}}
        return asyncio.run(client._acquire_server("some id", prompt_ids=[1], sampling_params=params))

    assert [ask(engine) for engine in (1, 0, 1)] == [("b:1", "second"), ("a:1", "first"), ("b:1", "second")]
    client._release_server("a:1", request_id="some id")  # no load balancer is asked
