"""The server of `verl_faults`."""

import asyncio

from future_l1_plugin.integrations.verl.failures import RequestAborted
from future_l1_plugin.integrations.verl.rollout_server import LatentHFServer


class AbortingServer(LatentHFServer):
    """Gives up the first request that comes after an update of the weights, while it waits for its batch."""

    _given_up = False

    async def generate(self, *args, **kwargs):
        if self._given_up or self._weights.version != 1 or not kwargs.get("mm_inputs"):
            return await super().generate(*args, **kwargs)
        self._given_up = True
        request = asyncio.ensure_future(super().generate(*args, **kwargs))
        while not (waiting := [one for one in self._requests if one.id == kwargs["request_id"]]):
            await asyncio.sleep(0)
        waiting[0].answer.set_exception(RequestAborted(f"request {waiting[0].id}: generation was aborted"))
        return await request
