"""What goes wrong in `test_two_engines_two_ranks_and_prompts_that_fail`. verl imports this in each of its processes.

Each engine gives one request up, and a prompt turns out longer than its files had said. In step 5 one element of one
gradient of the second rank is NaN.
"""

from wrapt import register_post_import_hook, wrap_function_wrapper


def on_rollout(module):
    from verl_faults_server import AbortingServer

    module.LatentHFServer = AbortingServer


def on_lengths(module):
    def length(wrapped, instance, args, kwargs):
        return min(wrapped(*args, **kwargs), 256)

    wrap_function_wrapper(module, "_length", length)


def on_engine(module):
    def step(wrapped, instance, args, kwargs):
        import torch

        instance.calls = getattr(instance, "calls", 0) + 1
        if instance.calls == 9 and torch.distributed.get_rank() == 1:  # two updates a step
            shards = [p.grad.to_local() for p in instance.module.parameters() if p.grad is not None]
            next(shard for shard in shards if shard.numel()).view(-1)[0] = float("nan")
        return wrapped(*args, **kwargs)

    wrap_function_wrapper(module, "LatentEngine.optimizer_step", step)


register_post_import_hook(on_engine, "future_l1_plugin.integrations.verl.engine")
register_post_import_hook(on_rollout, "future_l1_plugin.integrations.verl.rollout")
register_post_import_hook(on_lengths, "future_l1_plugin.data.lengths")
