"""What goes wrong in `test_three_prompts_that_fail_are_replaced_and_named`. verl imports this in each of its processes.

One engine gives one request up, and a prompt turns out longer than its files had said.
"""

from wrapt import register_post_import_hook, wrap_function_wrapper


def on_server(module):
    aborted = []

    async def generate(wrapped, server, args, kwargs):
        request = kwargs["request_id"]
        if kwargs.get("mm_inputs") is not None and server._version == 1 and not aborted:
            aborted.append(request)
            waiting = wrapped(*args, **kwargs)
            task = module.asyncio.ensure_future(waiting)
            while not (found := [one for one in server._requests if one.id == request]):
                await module.asyncio.sleep(0)
            module._fail(found, module.RequestAborted(f"request {request}: generation was aborted"))
            return await task
        return await wrapped(*args, **kwargs)

    wrap_function_wrapper(module, "LatentHFServer.generate", generate)


def on_lengths(module):
    def length(wrapped, instance, args, kwargs):
        return min(wrapped(*args, **kwargs), 256)

    wrap_function_wrapper(module, "prompt_length", length)


register_post_import_hook(on_server, "future_l1_plugin.integrations.verl.rollout_server")
register_post_import_hook(on_lengths, "future_l1_plugin.data.lengths")
