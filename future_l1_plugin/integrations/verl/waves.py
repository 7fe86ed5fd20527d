"""Which server decodes which rollouts of a call: by their places, so that a run of one seed can be repeated."""

from typing import Any

from future_l1_plugin.integrations.verl.host import LLMServerClient


class WaveClient(LLMServerClient):
    """verl's client for `latent_hf`: a request goes to the server that its wave names, past the load balancer.

    verl sends a request to the server with the least to do, so that two runs of one seed would decode other batches.
    """

    def __init__(self, *args: Any, servers: dict[str, Any], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.servers = servers  # handles by address

    async def _acquire_server(self, request_id: str, **extra: Any) -> tuple[str, Any]:
        engine = extra["sampling_params"]["latent"]["wave"]["engine"]
        return list(self.servers.items())[engine]

    def _release_server(self, server_id: str, request_id: str | None = None) -> None:
        """Nobody counts."""


def deal(name: str, prompts: int, n: int, engines: int | None) -> list[dict[str, Any]]:
    """A place for each prompt's group of n rollouts: prompt i goes to engine i mod `engines`; None = to any, one wave.

    Returns:
        for each prompt `id` and `size` (rollouts) of its wave, its group's 0-based `position` there, and `engine`.
    """
    waves = engines or 1
    counts = [len(range(wave, prompts, waves)) for wave in range(waves)]
    return [
        {
            "id": name if waves == 1 else f"{name}-{i % waves}",
            "size": counts[i % waves] * n,
            "position": i // waves,
            "engine": i % waves if engines else None,
        }
        for i in range(prompts)
    ]
