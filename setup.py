"""Builds the native library with CMake and ninja; README's "Install" explains the environment variables read here."""

import ctypes.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext as _build_ext

ROOT = Path(__file__).parent.resolve()
VERSION = re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1]
DEFAULT_ARCHS = "80-real;90-real;90-virtual"
TOOLKIT = " ".join(
    f'"nvidia-{part}==13.0.*"' for part in ("cuda-nvcc", "nvvm", "cuda-crt", "cuda-cccl", "cuda-runtime")
)
# pip builds in an environment of its own; the user's packages (torch, a pip-installed nvcc) are found all the same.
SITES = [Path(p) for p in dict.fromkeys([*sys.path, *(sysconfig.get_paths()[k] for k in ("platlib", "purelib"))]) if p]


def find_torch():
    return next((s / "torch" for s in SITES if (s / "torch/include/torch/csrc/stable/device.h").exists()), None)


def find_nvcc():
    places = [Path(os.environ.get("CUDA_HOME") or "none", "bin/nvcc"), Path(shutil.which("nvcc") or "none")]
    return next((p for p in [*places, *(s / "nvidia/cu13/bin/nvcc" for s in SITES)] if p.exists()), None)


def cuda_archs(nvcc):
    """CMake's list of architectures to build for; "" is a CPU-only build."""
    device = os.environ.get("QUEST_OPS_DEVICE", "auto")
    if device not in ("auto", "cpu", "cuda"):
        sys.exit(f"QUEST_OPS_DEVICE must be auto, cpu or cuda, got {device!r}")
    has_gpu = os.path.exists("/dev/nvidiactl") or bool(ctypes.util.find_library("cuda"))
    if device == "cpu" or (device == "auto" and not nvcc and not has_gpu):
        return ""
    if not nvcc:
        why = "this machine has an NVIDIA driver" if has_gpu else "QUEST_OPS_DEVICE=cuda"
        sys.exit(
            f"quest_ops: no nvcc in CUDA_HOME, on PATH or among pip's packages, but {why}. Install one: pip install "
            f"{TOOLKIT}; or set QUEST_OPS_DEVICE=cpu for CPU kernels alone."
        )
    if archs := os.environ.get("QUEST_OPS_CUDA_ARCHS"):
        return re.sub(r"[,\s]+", ";", archs.strip())
    if names := os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(";", " ").split():  # "8.0 9.0+PTX"
        return ";".join(re.sub(r"\D", "", a) + ("" if "PTX" in a else "-real") for a in names)
    return "native" if os.path.exists("/dev/nvidia0") else DEFAULT_ARCHS


class build_ext(_build_ext):  # the name under which setuptools reads its settings
    def run(self):
        torch, nvcc = find_torch(), find_nvcc()
        if torch is None:
            sys.exit("quest_ops: torch >= 2.10 was not found; install it first: pip install torch")
        archs, package = cuda_archs(nvcc), (ROOT if self.inplace else Path(self.build_lib).resolve()) / "quest_ops"
        defines = {"QUEST_VERSION": VERSION, "QUEST_TORCH": torch, "QUEST_OUTPUT_DIR": package}
        defines |= {"Python_EXECUTABLE": sys.executable, "QUEST_CUDA_ARCHS": archs, "CMAKE_CUDA_COMPILER": nvcc or ""}
        os.environ["PATH"] += os.pathsep + sysconfig.get_path("scripts")  # where pip put cmake and ninja
        print("quest_ops:", torch, f"{nvcc} for {archs}" if archs else "CPU kernels only", sep="\n  ", flush=True)
        build, settings = Path(self.build_temp).resolve(), [f"-D{name}={value}" for name, value in defines.items()]
        (build / "CMakeCache.txt").unlink(missing_ok=True)  # names the last build's ninja and nvcc
        subprocess.run(["cmake", "-G", "Ninja", "-S", ROOT, "-B", build, *settings], check=True)
        jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count())
        subprocess.run(["cmake", "--build", build, "--parallel", jobs], check=True)

    def get_outputs(self):
        return [str(p) for p in (Path(self.build_lib) / "quest_ops").glob("*.so")]


setup(
    ext_modules=[Extension("quest_ops._C", sources=[])],
    cmdclass={"build_ext": build_ext},
    setup_requires=[] if find_torch() else ["torch>=2.10"],  # asks for torch only where the user has none
)
