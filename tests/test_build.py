"""The native module: what it reports, how it chooses an instruction set, and how the build finds its tools."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import setuptools

import ffcl_fast
from ffcl_fast import _native

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"
COMPILER = shutil.which("c++") or shutil.which("g++")


@pytest.fixture(scope="module")
def build():
    """setup.py as a module."""
    spec = importlib.util.spec_from_file_location("ffcl_fast_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def fake_nvcc(path: Path, root: Path, version: str = "12.8") -> Path:
    """A program that answers as the nvcc of the toolkit in `root` does."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        "#!/bin/sh\n"
        'case "$*" in\n'
        f"  *--dryrun*) echo '#$ TOP={root}/bin/..' >&2 ;;\n"
        f"  *--version*) echo 'Cuda compilation tools, release {version}, V{version}.1' ;;\n"
        "  *--list-gpu-code*) printf 'sm_80\\nsm_90\\n' ;;\n"
        "esac\n"
    )
    path.chmod(0o755)
    return path


def fake_toolkit(root: Path) -> Path:
    (root / "include").mkdir(parents=True)
    (root / "include" / "cuda_runtime.h").touch()
    return fake_nvcc(root / "bin" / "nvcc", root)


def test_version_is_the_package_s():
    assert _native.version() == ffcl_fast.__version__


def test_build_info():
    info = _native.build_info()
    assert info["version"] == ffcl_fast.__version__
    assert info["isas"][0] == "portable"
    assert (info["cuda"] is not None) == _native.cuda_built() == bool(info["cuda_archs"])
    assert _native.isa() in info["isas"]


def run_isa(value: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", "from ffcl_fast import _native; print(_native.isa())"],
        env={**os.environ, "FFCL_ISA": value},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )


def test_isa_override():
    best = run_isa("")
    assert best.returncode == 0, best.stderr
    built = _native.build_info()["isas"]
    order = [isa for isa in ("portable", "avx2", "avx512", "amx") if isa in built]
    best = best.stdout.strip()
    assert best in (*order, "avx512_bf16"), "the others are for FFCL_ISA alone"
    place = order.index("avx512" if best == "avx512_bf16" else best)
    for isa in ("portable_bf16", "portable_amx"):
        assert run_isa(isa).stdout.strip() == isa
    for isa in order:
        result = run_isa(isa)
        if order.index(isa) <= place:
            assert result.stdout.strip() == isa
        else:
            assert result.returncode and f"this processor has {best} at best" in result.stderr
    if "avx512_bf16" in built:  # beside the order: a processor with AVX-512 may lack it, or have it and be no faster
        result = run_isa("avx512_bf16")
        assert result.stdout.strip() == "avx512_bf16" or "this processor has" in result.stderr


def test_pairs_are_multiplied_where_that_pays():
    """On AMD's processors, wherever they can be."""
    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    pay = "AuthenticAMD" in text and run_isa("avx512_bf16").returncode == 0
    assert (run_isa("").stdout.strip() == "avx512_bf16") == pay


def test_unknown_isa_is_named():
    result = run_isa("sse9")
    assert result.returncode and "avx512_bf16, portable_amx or amx; got 'sse9'" in result.stderr


def test_csrc_knows_nothing_of_torch():
    includes = re.compile(r"^\s*#\s*include\s*[<\"]((torch|ATen|c10|caffe2)/|[^>\"]*torch[^>\"]*)", re.MULTILINE)
    for path in CSRC.iterdir():
        assert not includes.search(path.read_text()), f"{path.name} includes a PyTorch header"


@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
@pytest.mark.parametrize("header", sorted(p.name for p in CSRC.glob("*.h") if "#pragma once" in p.read_text()))
def test_header_compiles_alone(header):
    source = f'#include "{header}"\n#include "{header}"\n'
    command = [COMPILER, "-std=c++17", "-fsyntax-only", "-Wall", "-Wextra", "-I", CSRC, "-x", "c++", "-"]
    result = subprocess.run([str(part) for part in command], input=source, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.mark.skipif(shutil.which("objdump") is None, reason="no objdump")
@pytest.mark.skipif("avx2" not in _native.build_info()["isas"], reason="not an x86-64 build")
def test_wide_registers_stay_in_their_instruction_set():
    """No function outside the namespaces of AVX sets may touch their registers: it could run where there are none."""
    listing = subprocess.run(["objdump", "-d", "--no-show-raw-insn", _native.__file__], capture_output=True, text=True)
    function, wide, tiles = "", set(), set()
    for line in listing.stdout.splitlines():
        named = re.match(r"[0-9a-f]+ <(.+)>:$", line)
        if named:
            function = named[1]
        elif "%ymm" in line or "%zmm" in line:
            wide.add(function)
        elif "%tmm" in line:
            tiles.add(function)
    # Mangled names carry the namespace as its length and its name.
    assert {f for f in wide if "4avx2" in f}, "the listing shows no AVX2 code at all"
    assert not {f for f in wide if not any(name in f for name in ("4avx2", "6avx512", "11avx512_bf16", "3amx"))}
    assert not {f for f in wide if any(name in f for name in ("8portable", "13portable_bf16", "12portable_amx"))}
    assert not {f for f in tiles if "3amx" not in f}
    assert bool(tiles) == ("amx" in _native.build_info()["isas"])


@pytest.mark.parametrize("asked, level", (("", "WARNING"), ("0", "INFO")))
def test_a_build_without_cuda_is_told(build, asked, level, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("FFCL_CUDA", asked)
    monkeypatch.setattr(build, "candidates", lambda env: [])
    with caplog.at_level("INFO"):
        assert build.CMakeBuild(setuptools.Distribution()).toolkit() is None
    (record,) = (record for record in caplog.records if "CUDA kernels left out" in record.getMessage())
    assert record.levelname == level


def test_asking_for_cuda_without_nvcc(build, tmp_path):
    env = {"FFCL_CUDA": "1", "PATH": str(tmp_path)}
    assert build.candidates(env, tmp_path) == []
    with pytest.raises(build.BuildError, match="FFCL_CUDA=1 asks for the CUDA kernels, but no working nvcc"):
        build.find_toolkit(env, build.candidates(env, tmp_path))


def test_without_nvcc_the_cpu_kernels_are_built(build, tmp_path):
    env = {"PATH": str(tmp_path)}
    toolkit, message = build.find_toolkit(env, build.candidates(env, tmp_path))
    assert toolkit is None
    assert "CUDA kernels left out: no working nvcc" in message


def test_cuda_can_be_left_out(build, tmp_path):
    fake_toolkit(tmp_path / "cuda-12.8")
    env = {"FFCL_CUDA": "0", "CUDA_HOME": str(tmp_path / "cuda-12.8"), "PATH": ""}
    assert build.find_toolkit(env)[0] is None


def test_cuda_setting_is_checked(build):
    with pytest.raises(build.BuildError, match="FFCL_CUDA must be 0, 1 or unset; got 'yes'"):
        build.find_toolkit({"FFCL_CUDA": "yes"})


def test_the_version_tells_what_is_compiled_where_asked(build, tmp_path, monkeypatch):
    (tmp_path / "ffcl_fast").mkdir()
    (tmp_path / "ffcl_fast" / "__init__.py").write_text('"""About."""\n\n__version__ = "1.2.3"\n')
    monkeypatch.setattr(build, "ROOT", tmp_path)
    fake_toolkit(tmp_path / "cuda")
    env = {"CUDA_HOME": str(tmp_path / "cuda"), "PATH": ""}
    assert build.version(env) == build.version(env | {"FFCL_LOCAL_VERSION": "0"}) == "1.2.3"
    assert build.version(env | {"FFCL_LOCAL_VERSION": "1"}) == "1.2.3+cu128"
    assert build.version(env | {"FFCL_LOCAL_VERSION": "1", "FFCL_CUDA": "0"}) == "1.2.3+cpu"
    with pytest.raises(build.BuildError, match="FFCL_LOCAL_VERSION must be 0, 1 or unset; got 'cu128'"):
        build.version(env | {"FFCL_LOCAL_VERSION": "cu128"})
    with pytest.raises(build.BuildError, match="FFCL_CUDA=1 asks for the CUDA kernels"):
        build.version({"FFCL_LOCAL_VERSION": "1", "FFCL_CUDA": "1"}, [])


def test_a_wrapper_on_the_path_leads_to_the_toolkit(build, tmp_path):
    root = tmp_path / "somewhere" / "cuda"
    own = fake_toolkit(root)
    wrapper = tmp_path / "bin" / "nvcc"
    wrapper.parent.mkdir()
    wrapper.write_text(f'#!/bin/sh\nexec {own} "$@"\n')
    wrapper.chmod(0o755)
    env = {"PATH": str(wrapper.parent)}
    toolkit, message = build.find_toolkit(env, build.candidates(env, tmp_path))
    assert toolkit.nvcc == own.resolve()
    assert toolkit.version == "12.8"
    assert str(own) in message


def test_newest_toolkit_folder_wins(build, tmp_path):
    for version in ("9.2", "12.8", "13.0"):
        fake_toolkit(tmp_path / f"cuda-{version}")
    env = {"PATH": ""}
    toolkit, _ = build.find_toolkit(env, build.candidates(env, tmp_path))
    assert toolkit.nvcc == tmp_path / "cuda-13.0" / "bin" / "nvcc"


def test_an_nvcc_without_headers_is_passed_over(build, tmp_path):
    fake_nvcc(tmp_path / "broken" / "bin" / "nvcc", tmp_path / "broken")
    whole = fake_toolkit(tmp_path / "cuda-12.8")
    env = {"CUDA_HOME": str(tmp_path / "broken"), "PATH": ""}
    assert build.find_toolkit(env, build.candidates(env, tmp_path))[0].nvcc == whole


def test_architectures(build, tmp_path):
    toolkit = build.inspect(fake_toolkit(tmp_path / "cuda"))
    assert build.choose_archs({}, toolkit) == "80;90a"  # this nvcc does not know sm_100
    assert build.choose_archs({"FFCL_CUDA_ARCHS": "86, 90a-real"}, toolkit) == "86;90a-real"
    with pytest.raises(build.BuildError, match="FFCL_CUDA_ARCHS must be like '80;90a;100'; got 'hopper'"):
        build.choose_archs({"FFCL_CUDA_ARCHS": "hopper"}, toolkit)
