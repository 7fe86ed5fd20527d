"""What goes wrong in `test_two_engines_two_ranks_and_prompts_that_fail`. verl imports this in each of its processes.

Each engine gives one request up, and a prompt turns out longer than its files had said.
"""

from wrapt import register_post_import_hook, wrap_function_wrapper


def on_rollout(module):
    from verl_faults_server import AbortingServer

    module.LatentHFServer = AbortingServer


def on_lengths(module):
    def length(wrapped, instance, args, kwargs):
        return min(wrapped(*args, **kwargs), 256)

    wrap_function_wrapper(module, "_length", length)


register_post_import_hook(on_rollout, "future_l1_plugin.integrations.verl.rollout")
register_post_import_hook(on_lengths, "future_l1_plugin.data.lengths")
