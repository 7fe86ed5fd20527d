"""`vllm serve` with the flags of latent decoding, which stand on its command line as ever.

    python -m future_l1_plugin.integrations.vllm CHECKPOINT [flags of vllm serve]

Chat completions then answer with latent spans. A request sets `vllm_xargs` (`params` says which keys); the latents are
in `kv_transfer_params` of the response.
"""

import json
import sys

from future_l1_plugin.integrations.vllm import engine_args
from future_l1_plugin.integrations.vllm.allocator import SLEEPS


def command(arguments: list[str]) -> list[str]:
    """Arguments of the command `vllm`, from ours: the checkpoint first, then flags."""
    path, *flags = arguments
    theirs = {name: True for name in SLEEPS if f"--{name.replace('_', '-')}" in flags}
    ours = {key: value for key, value in engine_args(path, **theirs).items() if key not in theirs}
    command = ["vllm", "serve", ours.pop("model")]
    for key, value in ours.items():
        values = value if isinstance(value, list) else [value]
        command += [f"--{key.replace('_', '-')}", *(v if isinstance(v, str) else json.dumps(v) for v in values)]
    return [*command, *flags]


def main() -> None:
    if not sys.argv[1:] or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    from vllm.entrypoints.cli.main import main as vllm

    sys.argv = command(sys.argv[1:])
    vllm()


if __name__ == "__main__":
    main()
