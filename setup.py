"""Builds the native library with CMake and ninja. Environment: QUEST_OPS_DEVICE=auto|cpu|cuda, QUEST_OPS_CUDA_ARCHS (or
TORCH_CUDA_ARCH_LIST), CUDA_HOME, MAX_JOBS. See the README's "Install"."""

import ctypes.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
VERSION = re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1]
DEFAULT_ARCHS = "80-real;90-real;90-virtual"
# pip builds in an environment of its own; the user's packages (torch, a pip-installed nvcc) are found all the same.
SITES = [Path(p) for p in dict.fromkeys([*sys.path, *(sysconfig.get_paths()[k] for k in ("platlib", "purelib"))]) if p]


def find_torch():
    return next((s / "torch" for s in SITES if (s / "torch/include/torch/csrc/stable/library.h").exists()), None)


def find_nvcc():
    homes = [Path(os.environ["CUDA_HOME"])] if os.environ.get("CUDA_HOME") else []
    on_path = shutil.which("nvcc")
    candidates = (
        [h / "bin/nvcc" for h in homes] + [Path(on_path)] * bool(on_path) + [s / "nvidia/cu13/bin/nvcc" for s in SITES]
    )
    return next((str(c) for c in candidates if c.exists()), None)


def cuda_archs(nvcc):
    """CMake's list of architectures to build for; "" is a CPU-only build."""
    device = os.environ.get("QUEST_OPS_DEVICE", "auto")
    if device not in ("auto", "cpu", "cuda"):
        sys.exit(f"QUEST_OPS_DEVICE must be auto, cpu or cuda, got {device!r}")
    has_gpu = os.path.exists("/dev/nvidiactl") or bool(ctypes.util.find_library("cuda"))
    if device == "cpu" or (device == "auto" and not nvcc and not has_gpu):
        return ""
    if not nvcc:
        sys.exit(
            "quest_ops: no nvcc in CUDA_HOME, on PATH or among pip's packages, but "
            + ("this machine has an NVIDIA driver" if has_gpu else "QUEST_OPS_DEVICE=cuda")
            + ". Install one: pip install "
            '"nvidia-cuda-nvcc==13.0.*" "nvidia-nvvm==13.0.*" "nvidia-cuda-crt==13.0.*" "nvidia-cuda-cccl==13.0.*" '
            '"nvidia-cuda-runtime==13.0.*"; or set QUEST_OPS_DEVICE=cpu for CPU kernels alone.'
        )
    if archs := os.environ.get("QUEST_OPS_CUDA_ARCHS"):
        return re.sub(r"[,\s]+", ";", archs.strip())
    if listed := os.environ.get("TORCH_CUDA_ARCH_LIST"):  # "8.0 9.0+PTX": +PTX keeps the virtual one too
        return ";".join(
            re.sub(r"\D", "", a) + ("" if "PTX" in a else "-real") for a in re.split(r"[;,\s]+", listed.strip())
        )
    return "native" if has_gpu and os.path.exists("/dev/nvidia0") else DEFAULT_ARCHS


class CMakeBuild(build_ext):
    def run(self):
        torch, nvcc = find_torch(), find_nvcc()
        if torch is None:
            sys.exit("quest_ops: torch >= 2.10 was not found; install it first: pip install torch")
        archs, output = cuda_archs(nvcc), (ROOT if self.inplace else Path(self.build_lib).resolve()) / "quest_ops"
        build = Path(self.build_temp).resolve()
        defines = {
            "CMAKE_BUILD_TYPE": "Release",
            "QUEST_TORCH_INCLUDE": torch / "include",
            "QUEST_TORCH_LIB": torch / "lib",
            "QUEST_CUDA_ARCHS": archs,
            "QUEST_VERSION": VERSION,
            "QUEST_OUTPUT_DIR": output,
            "Python_EXECUTABLE": sys.executable,
        }
        if archs:
            defines["CMAKE_CUDA_COMPILER"] = nvcc
        print(
            f"quest_ops: torch in {torch}, "
            + (f"nvcc {nvcc}, CUDA architectures {archs}" if archs else "CPU kernels only"),
            flush=True,
        )
        subprocess.run(
            ["cmake", "-G", "Ninja", "-S", ROOT, "-B", build, *(f"-D{k}={v}" for k, v in defines.items())], check=True
        )
        jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
        subprocess.run(["cmake", "--build", build, "--parallel", jobs], check=True)

    def get_outputs(self):
        return [str(p) for p in (Path(self.build_lib) / "quest_ops").glob("*.so")]


setup(
    ext_modules=[Extension("quest_ops._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
    setup_requires=[] if find_torch() else ["torch>=2.10"],  # asks for torch only where the user has none
)
