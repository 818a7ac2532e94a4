"""Where the fused quest_decode_attention spends its time, in clock cycles of an SM, phase by phase.

Needs a library that notes the clock, which is slower by a few percent; build one in a copy of the project:

    QUEST_OPS_PHASE_CLOCKS=1 QUEST_OPS_CUDA_ARCHS=90 pip install --no-build-isolation -e .
    python benchmarks/kernels.py --phases

A row is the median over the blocks of the last launch. "before" is what a block spends
waiting for the previous launch to end; the rest adds up to a launch. Phases end where a block's first thread passes,
so that what its other warps still wait for counts into the phase after.
"""

import ctypes

import torch
from cases import Case, Layers
from timing import release_memory

import quest_ops

WHAT = "median clock cycles of a block between phases of the fused quest_decode_attention"
# Each phase ends at the mark_phase() of this number; the first begins at mark 0.
PHASES = {
    "before": 1, "score": 2, "keys": 3, "threshold": 4, "list": 5, "attend": 6, "publish": 7, "parts": 8, "merge": 9,
}  # fmt: skip
CLOCKS_SHAPE = (264, 8, 10)  # blocks, warps, marks: phase_clocks in csrc/cuda/team.cuh, unsigned
READERS = {  # by the bits of the metadata
    "16": "quest_read_phase_clocks", "8": "quest_read_phase_clocks_8bit", "4": "quest_read_phase_clocks_4bit",
}  # fmt: skip


class PhaseClocks:
    """The clocks that the last fused launch noted. Raises RuntimeError where the library notes none."""

    def __init__(self):
        self._library = ctypes.CDLL(str(quest_ops._LIBRARY))
        if not hasattr(self._library, READERS["16"]):
            raise RuntimeError(
                f"{quest_ops._LIBRARY} notes no clocks: build it with QUEST_OPS_PHASE_CLOCKS=1 (phases.py)"
            )

    def read(self, bits: str) -> torch.Tensor:
        """[blocks, marks] int64 of each block's first warp; blocks that the launch did not have keep earlier clocks.

        bits: "4", "8" or "16", of a number of the metadata that the launch had.
        """
        clocks = torch.zeros(CLOCKS_SHAPE, dtype=torch.uint32)
        error = getattr(self._library, READERS[bits])(ctypes.c_void_p(clocks.data_ptr()))
        if error:
            raise RuntimeError(f"reading the clocks failed with CUDA error {error}")
        return clocks[:, 0].long()


def median_cycles(before: torch.Tensor, after: torch.Tensor) -> dict[str, int] | None:
    """Of the blocks that ran between two readings; None where there are none: not the fused path."""
    ran = (before != after).any(1)
    if not ran.any():
        return None
    cycles = after[ran][:, [0, *PHASES.values()]].diff(dim=1) % 2**32  # the clock's low half wraps around
    return dict(zip(PHASES, cycles.median(0).values.tolist()))


def measure(clocks: PhaseClocks, cases: list[Case]) -> list[dict]:
    """Prints and returns a row for each case and page size that the fused path selects pages for."""
    rows = []
    print(f"{'case':22}{'page':>5}{'bits':>5}{'us':>9}" + "".join(f"{p:>11}" for p in [*PHASES, "total"]))
    for case in cases:
        if case.context <= case.budget:  # nothing to select
            continue
        layers = Layers(case)
        for pages in case.pages:
            bits = case.metadata_bits(pages)
            where = f"{case.name:22}{pages.size:5}{bits:>5}"
            before = clocks.read(bits)
            us = layers.us(lambda i, at=layers, p=pages: at.quest(i, p, workspace=at.workspace))
            cycles = median_cycles(before, clocks.read(bits))
            if cycles is None:
                print(f"{where}{us:9.2f}  not the fused path", flush=True)
                continue
            total = sum(cycles.values()) - cycles["before"]
            print(f"{where}{us:9.2f}" + "".join(f"{c:11}" for c in [*cycles.values(), total]), flush=True)
            shared = {"case": case.name, "page_size": pages.size, "metadata": bits}
            rows.append(shared | {"us": us, "cycles": cycles})
        del layers
        release_memory()
    return rows
