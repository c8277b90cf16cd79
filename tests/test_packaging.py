"""Packaging: which wheels are built, what they may hold and need, what runs against them, what runs before a commit."""

from __future__ import annotations

import importlib.util
import re
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
from test_build import fake_toolkit

import setup
from ffcl_fast import _native
from tools import wheels

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def check_wheel():
    spec = importlib.util.spec_from_file_location("check_wheel", ROOT / ".ci" / "check_wheel.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_cuda_wheel_where_there_is_an_nvcc(tmp_path, monkeypatch):
    fake_toolkit(tmp_path / "cuda")
    env = {"CUDA_HOME": str(tmp_path / "cuda"), "PATH": ""}
    assert wheels.kinds(env)["CUDA"] == {"FFCL_CUDA": "1", "FFCL_LOCAL_VERSION": "1"}
    assert wheels.kinds(env | {"FFCL_CUDA": "0"}) == {"CPU": {"FFCL_CUDA": "0", "FFCL_LOCAL_VERSION": "0"}}
    monkeypatch.setattr(setup, "candidates", lambda env: [])
    assert list(wheels.kinds({})) == ["CPU"]
    with pytest.raises(setup.BuildError, match="FFCL_CUDA=1"):
        wheels.kinds({"FFCL_CUDA": "1"})


@pytest.mark.skipif(shutil.which("readelf") is None, reason="no readelf")
def test_a_module_may_need_only_what_every_linux_has(check_wheel):
    check_wheel.check_libraries(Path("ours.whl"), Path(_native.__file__))
    with pytest.raises(SystemExit, match=r"theirs.whl: .*libtorch.*looks in \['\$ORIGIN"):
        check_wheel.check_libraries(Path("theirs.whl"), Path(torch._C.__file__))


def test_what_a_wheel_must_and_must_not_hold(check_wheel, tmp_path):
    with zipfile.ZipFile(tmp_path / "x.whl", "w") as archive:
        for name in (*check_wheel.NEEDED[1:], "csrc/parallel.h"):
            archive.writestr(f"x.dist-info{name}" if name.startswith("/") else name, "")
    with pytest.raises(SystemExit, match=r"lacks \['ffcl_fast/py.typed'\] and should not hold \['csrc/parallel.h'\]"):
        check_wheel.check_contents(tmp_path / "x.whl")


def test_a_new_file_of_tests_runs_against_the_wheel(check_wheel, tmp_path, capsys):
    for name, text in {
        "test_new.py": "import torch\nimport ffcl_fast.functional as fn\n",
        "test_tool.py": "def test():\n    from tools.kernels import problems\n",
        "test_training.py": "import ffcl_fast.train.run\n",
        "test_trainer.py": "from ffcl_fast import train\n",
        "test_cli.py": "from ffcl_fast.train import run\n",
        "compat/test_other.py": "import toolshed\n",
        "helper.py": "",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    kept = ("compat/test_other.py", "test_cli.py", "test_new.py")
    assert check_wheel.chosen(tmp_path) == [f"{tmp_path.name}/{name}" for name in kept]
    assert "3 of 6 files" in capsys.readouterr().out


def test_hooks_before_a_commit_are_what_make_lint_runs():
    pins = dict(re.findall(r"^([\w-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    config = (ROOT / ".pre-commit-config.yaml").read_text()
    hooks = dict(re.findall(r"repo: \S+/(ruff|mirrors-clang)-[a-z-]+\n +rev: v(\S+)", config))
    assert hooks == {"ruff": pins["ruff"], "mirrors-clang": pins["clang-format"]}
