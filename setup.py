"""Packaging. Requirements come from the table in future_l1_plugin/compat.py; nothing of the package is imported.

The top-level folders `patches/`, `recipes/` and `lmms_tasks/` are installed inside the package, so that a wheel has all
of them and puts nothing else at the top of site-packages. An editable install finds them through a finder that only
PEP 517 builds write, hence the check for the older `setup.py develop`.
"""

import importlib.util
import re
import sys
from pathlib import Path

from setuptools import setup

if "develop" in sys.argv:
    raise SystemExit("future_l1_plugin: use `pip install --use-pep517 -e .` (the older way cannot map patches/)")

ROOT = Path(__file__).resolve().parent
MAPPED = ("patches", "recipes", "lmms_tasks")


def load_compat():
    """The table of versions, loaded by its path: at build time the package is not importable."""
    spec = importlib.util.spec_from_file_location("_future_l1_compat", ROOT / "future_l1_plugin" / "compat.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def folders(top: str) -> list[str]:
    """A folder and its subfolders as paths relative to the root; caches and folders of bare data are left out."""
    found = [ROOT / top, *(p for p in sorted((ROOT / top).rglob("*")) if p.is_dir())]
    kept = [p for p in found if "__pycache__" not in p.parts and (top in MAPPED or any(p.glob("*.py")))]
    return [p.relative_to(ROOT).as_posix() for p in kept]


compat = load_compat()
package_dir = {"future_l1_plugin": "future_l1_plugin"}
for name in MAPPED:
    package_dir |= {"future_l1_plugin." + folder.replace("/", "."): folder for folder in folders(name)}
own = [folder.replace("/", ".") for folder in folders("future_l1_plugin")]
readme = ROOT / "README.md"

setup(
    name="future_l1_plugin",
    version=re.search(r'__version__ = "([^"]+)"', (ROOT / "future_l1_plugin" / "__init__.py").read_text())[1],
    description="Interleaved latent visual reasoning (Future-L1) for transformers, verl, vLLM and lmms-eval",
    long_description=readme.read_text(encoding="utf-8") if readme.is_file() else "",
    long_description_content_type="text/markdown",
    python_requires=compat.PYTHON,
    packages=[*own, *(name for name in package_dir if name != "future_l1_plugin")],
    package_dir=package_dir,
    package_data={
        "": ["*.yaml", "*_yaml", "*.json", "*.jinja", "*.html", "*.md"],
        "future_l1_plugin.model": ["micro_base/*"],
    },
    include_package_data=False,
    install_requires=compat.requirements(),
    extras_require={extra: compat.requirements(extra) for extra in (*compat.EXTRAS, "all")},
    entry_points={
        "console_scripts": ["future-l1 = future_l1_plugin.cli:main"],
        "verl.plugins": ["future_l1 = future_l1_plugin.integrations.verl.plugin"],
        "lmms_eval.models": ["future_l1 = future_l1_plugin.integrations.lmms_eval.registry:manifests"],
        "vllm.general_plugins": ["future_l1 = future_l1_plugin.integrations.vllm:register"],
    },
)
