"""libquest_ops.so: one file for every Python and torch, with and without a GPU."""

import os
import pathlib
import re
import shutil
import subprocess
import sys
import textwrap

import pytest

import quest_ops
from quest_ops import info

LIBRARY = pathlib.Path(quest_ops.__file__).parent / "libquest_ops.so"


def output_of(*command):
    if not shutil.which(command[0]):
        pytest.skip(f"needs {command[0]}")
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def run_python(code):
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def undefined_symbols():
    return [line.split()[-1] for line in output_of("nm", "-D", "--undefined-only", str(LIBRARY)).splitlines()]


def test_no_python_symbol():
    assert [s for s in undefined_symbols() if re.match(r"_?Py[A-Z_]", s)] == []


def test_no_cpp_torch_symbol():
    """Namespaces at, c10, caffe2 and torch have no stable ABI; aoti_torch_* and torch_* are C."""
    cpp_torch = re.compile(r"^_Z\w*?(2at|3c10|6caffe2|5torch)[0-9NCDI]")
    symbols = undefined_symbols()
    assert any(s.startswith(("aoti_torch_", "torch_")) for s in symbols), "this is not a list of its symbols"
    assert [s for s in symbols if cpp_torch.match(s)] == []


def test_exports_no_kernel():
    """Hidden visibility: its C++ functions cannot clash with another library's."""
    defined = output_of("nm", "-D", "--defined-only", str(LIBRARY)).split()
    assert [s for s in defined if s.startswith("_Z") and "quest" in s] == []


def test_needs_no_cuda_runtime():
    needed = [line for line in output_of("readelf", "-d", str(LIBRARY)).splitlines() if "NEEDED" in line]
    assert needed and not [line for line in needed if re.search(r"cuda|libtorch_python|libpython", line)]


def test_is_small():
    assert LIBRARY.stat().st_size < 30e6


def test_loads_without_the_package():
    code = f"""
        import torch
        torch.ops.load_library({str(LIBRARY)!r})
        lens = torch.tensor([20], dtype=torch.int32)
        ids, counts = torch.ops.quest_ops.select_topk_pages(torch.rand(1, 1, 4), lens, 16, 4, 1, 1)
        print(ids.tolist(), counts.tolist())
    """
    assert run_python(code).split("\n")[0] == "[[[0, 1, -1, -1]]] [[2]]"


def test_the_package_works_without_the_pybind_module():
    code = """
        import sys
        sys.modules["quest_ops._C"] = None  # an import of it raises ImportError
        import torch
        import quest_ops
        lens = torch.tensor([20], dtype=torch.int32)
        print(quest_ops.select_topk_pages(torch.rand(1, 1, 4), lens, 16, 4, 1, 1)[1].item())
    """
    assert run_python(code).strip() == "2"


def test_importing_the_package_leaves_the_compiler_of_torch_out():
    """torch._dynamo and what it imports take over a second."""
    code = """
        import sys, torch
        before = "torch._dynamo" in sys.modules
        import quest_ops
        print(before == ("torch._dynamo" in sys.modules))
    """
    assert run_python(code).strip() == "True"


def test_twins_need_torch_alone():
    code = f"""
        import importlib.util, sys
        spec = importlib.util.spec_from_file_location("reference", {str(LIBRARY.parent / "reference.py")!r})
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
        print("quest_ops" in sys.modules)
    """
    assert run_python(code).strip() == "False"


@pytest.mark.parametrize("capability", ["plain", "avx2", "avx512"])
def test_every_instruction_set_keeps_the_promises(capability):
    """The kernels for other chips than this one, in a process of their own: the choice is made once."""
    if info.cpu_kernels() == capability:
        pytest.skip(f"this process runs {capability}")
    environment = os.environ | {"QUEST_OPS_CPU_CAPABILITY": capability, "QUEST_OPS_TEST_EXAMPLES": "20"}
    asked = [sys.executable, "-c", "from quest_ops import info; print(info.cpu_kernels())"]
    chosen = subprocess.run(asked, check=True, capture_output=True, text=True, env=environment).stdout.strip()
    if "this machine and build support" in chosen:
        pytest.skip(chosen)
    assert chosen == capability
    tests = pathlib.Path(__file__).parent
    files = [tests / f"test_{name}.py" for name in ("append", "metadata", "scores", "selection", "attention")]
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-m",
        "not gpu",
        "-k",
        "not long",
        "-p",
        "no:cacheprovider",
        *files,
    ]
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=environment, cwd=tests.parent)
    assert done.returncode == 0, done.stdout
