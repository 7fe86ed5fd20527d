"""The self-test of `make test-gpu`: does this card compute what the CPU tests prove, and how fast?

    runner        one process a part, with its time limit; prints as it goes, writes the JSON after each part
    child         that process
    results       figures, the rules they must hold to, verdicts; the Markdown table
    environment   card, versions, commit
    models        random Qwen3-VLs of real and of tiny shape, made on the device, without tokenizer or hub
    passes        the same rollouts decoded, packed, padded, one by one: mu and log-probabilities of each
    a_ .. f_      the parts

Every part also runs, small, on a CPU: the same code with tiny shapes, float32 beside bf16. What only a GPU can show is
skipped there, and says so. Nothing here is imported by the rest of the package.
"""

from typing import NamedTuple


class Part(NamedTuple):
    """One part of the self-test."""

    module: str  # has run(results, setting)
    title: str
    limit: int  # seconds, full size on an H100; all of them together stay under eight minutes
    small_limit: int  # seconds, small on two busy CPU cores
    covered: str = ""  # what covers it on a CPU, where it then runs only if it is asked for


_HERE = "future_l1_plugin.gpu_check"
PARTS = {
    "a": Part(f"{_HERE}.a_precision", "bf16: decoding against packed and padded passes", 60, 120),
    "b": Part(f"{_HERE}.b_steps", "grammar, samplers, latent write: no wait for the device, CUDA graphs", 35, 120),
    "c": Part(f"{_HERE}.c_training", "channel, density, KL and loss under autocast; memory", 35, 120),
    "d": Part(f"{_HERE}.d_speed", "time: decoding with spans, SFT step with latents", 50, 180),
    "e": Part(f"{_HERE}.e_vllm", "vLLM: equality, log-probabilities, sleep, speed", 220, 600, "make test-vllm"),
    "f": Part(f"{_HERE}.f_verl", "verl: two steps of la_dapo_micro", 80, 600, "tests/integrations/test_verl_runs.py"),
}
