"""Where the fused quest_decode_attention spends its time, in clock cycles of an SM, phase by phase.

Needs a library that notes the clock, which is slower by a few percent; build one in a copy of the project:

    QUEST_OPS_PHASE_CLOCKS=1 QUEST_OPS_CUDA_ARCHS=90 pip install --no-build-isolation -e .
    python benchmarks/phases.py

A row is the median over the blocks of the last launch. "before" is what a block spends waiting for the previous launch
to end; the rest adds up to a launch. Phases end where a block's first thread passes, so that what its other warps still
wait for counts into the phase after.
"""

import argparse
import ctypes

import torch
from kernels import BUDGET, CASES, HEAD_DIM, PAGE, Q_HEADS, Layers

import quest_ops
from quest_ops import _C

PHASES = ["before", "score", "keys", "threshold", "list", "attend", "publish", "parts", "merge"]
MAX_BLOCKS = 512  # kMaxClockedBlocks in csrc/cuda/team.cuh


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", action="append", choices=[c.name for c in CASES], help="only these cases")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("needs a CUDA device")
    library = ctypes.CDLL(str(quest_ops._LIBRARY))
    if not hasattr(library, "quest_read_phase_clocks"):
        parser.error("this library notes no clocks: build it with QUEST_OPS_PHASE_CLOCKS=1, see --help")

    properties = torch.cuda.get_device_properties(0)
    capability, num_sms = 10 * properties.major + properties.minor, properties.multi_processor_count
    print(f"{'case':14}{'us':>8}" + "".join(f"{p:>11}" for p in [*PHASES, "total"]))
    for case in CASES:
        if args.case and case.name not in args.case:
            continue
        if case.tokens <= BUDGET:  # nothing to select
            continue
        layers = Layers(case, torch.float16)
        workspace = torch.zeros(quest_ops.ops.WORKSPACE_BYTES, dtype=torch.uint8, device="cuda")
        us = layers.us(lambda i, at=layers, space=workspace: at.quest(i, workspace=space))
        clocks = torch.empty(MAX_BLOCKS, len(PHASES) + 1, dtype=torch.int64)
        error = library.quest_read_phase_clocks(ctypes.c_void_p(clocks.data_ptr()))
        if error:
            raise RuntimeError(f"reading the clocks failed with CUDA error {error}")
        teams = case.batch * case.kv_heads
        plan = _C.plan_fused(capability, num_sms, teams, Q_HEADS // case.kv_heads, HEAD_DIM, case.tokens // PAGE)
        cycles = clocks[: teams * plan["team_size"]].diff(dim=1).median(0).values.tolist()
        print(f"{case.name:14}{us:8.2f}" + "".join(f"{c:11}" for c in [*cycles, sum(cycles[1:])]), flush=True)
        del layers
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
