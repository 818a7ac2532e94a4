"""What `quest-ops info` prints: versions, devices, which kernels each runs, and what is wrong if something is."""

from __future__ import annotations

import ctypes
import platform
import re
import sys
from dataclasses import dataclass
from pathlib import Path

MIN_CAPABILITY = (8, 0)  # the kernels multiply bfloat16 on tensor cores
FUSED_CAPABILITY = (9, 0)  # from here on plan_team (csrc/plan.h) looks whether a step fits the chip


@dataclass(frozen=True)
class Device:
    """A CUDA device as torch sees it. capability: (9, 0) for sm_90. memory: bytes."""

    index: int
    name: str
    capability: tuple[int, int]
    memory: int


@dataclass(frozen=True)
class System:
    """All that the report is made from.

    built_archs: the CUDA architectures in libquest_ops.so, as CMake writes them ("80-real", "90-virtual"); () in a
        CPU-only build; None: unknown, since quest_ops._C is missing.
    built_cuda: version of the nvcc that built it, torch_cuda: of torch's CUDA runtime ("13.0"), None without.
    driver_cuda: newest CUDA version that the driver runs, (13, 0); None without a driver.
    cpu_kernels: their instruction set, or what is wrong with the one that QUEST_OPS_CPU_CAPABILITY asks for.
    """

    quest_ops: str
    torch: str
    python: str
    platform: str
    cpu_kernels: str
    built_archs: tuple[str, ...] | None
    built_cuda: str | None
    torch_cuda: str | None
    driver_cuda: tuple[int, int] | None
    devices: tuple[Device, ...]


def how_arch_runs(arch: str, capability: tuple[int, int]) -> str | None:
    """ "compiled", "PTX" or None: how code for a CMake architecture runs on a chip.

    Compiled code runs on its own major version from its minor version on, PTX on every later chip too; names that end
    in "a" run on that very chip, in "f" on its major version (CUDA C++ Programming Guide, "Compute capabilities").
    "all" and "all-major" hold code for each chip that nvcc knows.
    """
    if arch in ("all", "all-major"):
        return "compiled"
    match = re.fullmatch(r"(\d+)(\d)([af]?)(-real|-virtual)?", arch)
    if match is None:
        raise ValueError(f"arch must look like '90', '90a', '90-real' or '90-virtual', got {arch!r}")
    built = (int(match[1]), int(match[2]))
    if capability < built or (match[3] == "a" and capability != built):
        return None
    if match[4] != "-virtual" and capability[0] == built[0]:
        return "compiled"
    return "PTX" if match[4] != "-real" and (not match[3] or capability[0] == built[0]) else None


def describe_device(device: Device, system: System) -> tuple[bool, str]:
    """Whether quest_ops runs on the device, and with which kernels and why, or what hinders it and the remedy."""
    sm = "".join(map(str, device.capability))
    if device.capability < MIN_CAPABILITY:
        return False, "the CUDA kernels need compute capability 8.0 or later"
    if system.built_archs is None:
        return True, "portable CUDA kernels if this build has them: quest_ops._C is missing, so that is not known"
    if not system.built_archs:
        return False, "this build has CPU kernels only: install with QUEST_OPS_DEVICE=cuda where nvcc is found"
    built_cuda = _version(system.built_cuda)
    driver = system.driver_cuda
    if built_cuda and driver and driver[0] < built_cuda[0]:
        return (
            False,
            f"the driver runs CUDA {_text(driver)}, older than nvcc {system.built_cuda} of this build: update it",
        )
    ways = {arch: how_arch_runs(arch, device.capability) for arch in system.built_archs}
    compiled = [arch for arch, way in ways.items() if way == "compiled"]
    ptx = [arch for arch, way in ways.items() if way == "PTX"]
    if not compiled and not ptx:
        return False, f"no code for it among the built architectures: rebuild with QUEST_OPS_CUDA_ARCHS={sm}"
    if not compiled and built_cuda and driver and driver < built_cuda:
        return False, (
            f"only PTX ({ptx[-1]}) fits it, and the driver (CUDA {_text(driver)}) cannot compile that of nvcc "
            f"{system.built_cuda}: update the driver, or rebuild with QUEST_OPS_CUDA_ARCHS={sm}"
        )
    code = compiled[-1] if compiled else f"{ptx[-1]} (PTX, compiled by the driver at first use)"
    path = "portable CUDA kernels"
    if device.capability >= FUSED_CAPABILITY:
        path = "quest_decode_attention in one launch (fused) up to 8 query heads a KV head, else " + path
    return True, f"{path}; code for {code}"


def find_problems(system: System) -> list[str]:
    """What keeps a GPU of this machine from being used; empty where all is well."""
    problems = []
    if system.driver_cuda is not None and not system.devices:
        if system.torch_cuda is None:
            problems.append(
                f"this machine has an NVIDIA driver, but torch {system.torch} is a CPU build: install one with CUDA"
            )
        elif system.driver_cuda < _version(system.torch_cuda):
            problems.append(
                f"torch sees no GPU: the driver runs CUDA {_text(system.driver_cuda)}, this torch is built for "
                f"{system.torch_cuda}: update the driver"
            )
        else:
            problems.append("this machine has an NVIDIA driver, but torch sees no GPU (CUDA_VISIBLE_DEVICES?)")
    for device in system.devices:
        usable, why = describe_device(device, system)
        if not usable:
            problems.append(f"cuda:{device.index} cannot be used: {why}")
    return problems


def report(system: System) -> str:
    """The lines of `quest-ops info`."""
    built = {None: "unknown: quest_ops._C is missing", (): "none: CPU kernels only"}.get(system.built_archs)
    lines = [
        f"quest_ops    {system.quest_ops}",
        f"torch        {system.torch}",
        f"Python       {system.python} on {system.platform}",
        f"CUDA         driver: {_text(system.driver_cuda)}, torch: {system.torch_cuda or 'none'}, "
        f"nvcc of this build: {system.built_cuda or 'none'}",
        f"built archs  {built or ', '.join(system.built_archs)}",
        f"cpu          CPU kernels: {system.cpu_kernels}",
    ]
    for device in system.devices:
        sm = "{}.{}".format(*device.capability)
        lines.append(
            f"{f'cuda:{device.index}':12} {device.name}, compute capability {sm}, {device.memory / 2**30:.0f} GiB"
        )
        lines.append(f"{'':12} {describe_device(device, system)[1]}")
    problems = find_problems(system)
    return "\n".join(lines + [f"problem      {problem}" for problem in problems])


def cpu_kernels() -> str:
    """Instruction set of the CPU kernels, "avx512", "avx2" or "plain", or what is wrong with the one asked for."""
    library = ctypes.CDLL(str(Path(__file__).with_name("libquest_ops.so")))
    library.quest_ops_cpu_capability.restype = ctypes.c_char_p
    return library.quest_ops_cpu_capability().decode()


def inspect_system() -> System:
    """This machine, this build."""
    import torch

    import quest_ops

    try:
        from quest_ops import _C
    except ImportError:
        archs = built_cuda = None
    else:
        archs, built_cuda = tuple(filter(None, _C.cuda_archs.split(","))), _C.cuda_version or None
    devices = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        capability = (properties.major, properties.minor)
        devices.append(Device(index, properties.name, capability, properties.total_memory))
    return System(
        quest_ops=quest_ops.__version__,
        torch=torch.__version__,
        python=platform.python_version(),
        platform=f"{sys.platform} {platform.machine()}",
        cpu_kernels=cpu_kernels(),
        built_archs=archs,
        built_cuda=built_cuda,
        torch_cuda=torch.version.cuda,
        driver_cuda=_driver_cuda(),
        devices=tuple(devices),
    )


def choose_device(name: str) -> str:
    """The torch device for --device. Raises ValueError for one that torch or this build does not have."""
    import torch

    system = inspect_system()
    devices = system.devices
    if name == "auto":
        name = "cuda" if devices else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ValueError(f'--device must be "auto", "cpu", "cuda" or "cuda:N", got {name!r}')
    if device.type == "cuda":
        index = device.index or 0
        if index >= len(devices):
            raise ValueError(f"--device {name}: torch sees {len(devices)} CUDA devices; quest-ops info tells more")
        usable, why = describe_device(devices[index], system)
        if not usable:
            raise ValueError(f"--device {name}: {why}; --device cpu does without it")
    return name


def _driver_cuda() -> tuple[int, int] | None:
    version = ctypes.c_int()
    try:
        failed = ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    except OSError:
        return None
    return None if failed else (version.value // 1000, version.value % 1000 // 10)


def _version(text: str | None) -> tuple[int, int] | None:
    """(13, 0) of "13.0.88"."""
    return None if text is None else tuple(int(part) for part in text.split(".")[:2])


def _text(version: tuple[int, int] | None) -> str:
    return "none" if version is None else "{}.{}".format(*version)
