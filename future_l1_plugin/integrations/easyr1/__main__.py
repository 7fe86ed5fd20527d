"""`python -m future_l1_plugin.integrations.easyr1 config=FILE key=value ..`"""

import sys
from collections.abc import Sequence

from future_l1_plugin.compat import require_easyr1
from future_l1_plugin.errors import UserError

#: As EasyR1's own entry point sets them.
_WORKERS_ENV = {
    "TOKENIZERS_PARALLELISM": "true",
    "TORCH_NCCL_AVOID_RECORD_STREAMS": "1",
    "CUDA_DEVICE_MAX_CONNECTIONS": "1",
}


def main(arguments: Sequence[str]) -> None:
    """Check everything, then train. Raises UserError."""
    require_easyr1()
    import ray

    from future_l1_plugin.integrations.easyr1.config import load_config
    from future_l1_plugin.integrations.easyr1.trainer import Runner

    config = load_config(arguments)
    if not ray.is_initialized():
        ray.init(runtime_env={"env_vars": _WORKERS_ENV})
    try:
        ray.get(ray.remote(num_cpus=1)(Runner).remote().run.remote(config))
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, UserError):
            raise error.cause from None
        raise
    if config.trainer.ray_timeline is not None:
        ray.timeline(filename=config.trainer.ray_timeline)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        sys.exit(f"future_l1_plugin: {error}")
