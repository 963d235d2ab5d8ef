"""The wheel: built from the sources, installed into a bare environment, imported and started there."""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from email.parser import Parser
from pathlib import Path

import hf_usp

ROOT = Path(__file__).parents[1]
# Every module, where no package is installed that is not a dependency; then where hf_usp is.
IMPORTS = """
import importlib, pkgutil, sys
for name in ("bitsandbytes", "datasets", "deepspeed", "flash_attn", "gguf", "hypothesis", "matplotlib", "peft", "trl"):
    sys.modules[name] = None
import hf_usp
for module in pkgutil.walk_packages(hf_usp.__path__, "hf_usp."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
print(hf_usp.__file__)
"""
EXTRAS = {"flash", "trl", "deepspeed", "liger", "docs", "dev", "train", "plot"}


def run(*words: str | Path, cwd: Path) -> str:
    done = subprocess.run([str(w) for w in words], cwd=cwd, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_wheel_installs_and_starts_in_a_bare_environment(tmp_path: Path) -> None:
    source, bare = tmp_path / "source", tmp_path / "bare"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "hf_usp", source / "hf_usp", ignore=shutil.ignore_patterns("__pycache__"))
    pip = (sys.executable, "-m", "pip")
    run(*pip, "wheel", ".", "--no-deps", "--no-index", "--no-build-isolation", "-q", "-w", tmp_path, cwd=source)
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name == f"hf_usp-{hf_usp.__version__}-py3-none-any.whl"

    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        folder = f"hf_usp-{hf_usp.__version__}.dist-info"
        metadata = Parser().parsestr(archive.read(f"{folder}/METADATA").decode())
        sources = {f"hf_usp/{p.relative_to(ROOT / 'hf_usp').as_posix()}" for p in (ROOT / "hf_usp").rglob("*.py")}
        assert sources | {"hf_usp/py.typed"} == {name for name in names if not name.startswith(folder)}
        assert "Apache License" in archive.read(f"{folder}/licenses/LICENSE").decode()
    assert metadata["License-Expression"] == "Apache-2.0" and metadata["Requires-Python"] == ">=3.11"
    assert set(metadata.get_all("Provides-Extra")) == EXTRAS
    needed = [line for line in metadata.get_all("Requires-Dist") if "extra ==" not in line]
    assert sorted(line.split(">")[0] for line in needed) == ["accelerate", "numpy", "torch", "transformers"]

    venv.create(bare, with_pip=False, symlinks=True)
    run(*pip, "--python", bare, "install", "--no-deps", "--no-index", "-q", wheel, cwd=tmp_path)
    (site,) = bare.glob("lib/python*/site-packages")
    # The wheel's dependencies are lent by this environment; its own editable hf_usp is not followed from there.
    (site / "lent.pth").write_text(sysconfig.get_path("purelib") + "\n")
    python = bare / "bin" / "python"
    assert run(python, "-I", "-c", IMPORTS, cwd=tmp_path).strip() == str(site / "hf_usp" / "__init__.py")
    script = (bare / "bin" / "hf-usp").read_text().splitlines()
    assert script[0].startswith(f"#!{bare}")
    assert "plan" in run(python, "-I", bare / "bin" / "hf-usp", "--help", cwd=tmp_path)
