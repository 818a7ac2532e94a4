"""Times every op beside FlashInfer's dense decode and torch's SDPA in the same run, on a GPU.

    python benchmarks/kernels.py --json benchmarks/results/kernels-h100.json --csrc-tree $(git rev-parse HEAD:csrc)

Columns are microseconds a layer: L2 cold, CUDA graph, median of replays, random data. "floor" is 2.3 us + bytes / 2.95
TB/s on an H100: the bytes that must move (metadata of all pages, K and V of the chosen ones, q and out) at the rate of
scattered 16-byte loads. "ratio" is FlashInfer's time (SDPA's where it is not installed) over that of "quest".
"""

import argparse
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from timing import graph_us

import quest_ops

PAGE, BUDGET, HEAD_DIM, Q_HEADS = 16, 2048, 128, 32
FLOOR_START_US, FLOOR_BYTES_PER_US = 2.3, 2.95e6


@dataclass
class Case:
    name: str
    kv_heads: int
    tokens: int
    batch: int


CASES = [
    Case("gqa8-2k-b1", 8, 2048, 1),
    Case("gqa8-4k-b1", 8, 4096, 1),
    Case("gqa8-8k-b1", 8, 8192, 1),
    Case("mha-32k-b1", 32, 32768, 1),
    Case("mha-128k-b1", 32, 131072, 1),
    Case("gqa8-32k-b1", 8, 32768, 1),
    Case("gqa8-128k-b1", 8, 131072, 1),
    Case("gqa8-32k-b8", 8, 32768, 8),
]


class Layers:
    """Several layers' pools of one case: enough of them that a step's bytes overflow L2 before a pool is read again."""

    def __init__(self, case: Case, dtype: torch.dtype):
        self.case = case
        blocks = case.batch * case.tokens // PAGE
        touched = 2 * HEAD_DIM * 2 * case.kv_heads * (blocks + case.batch * min(BUDGET, case.tokens))
        self.count = max(4, math.ceil(150e6 / touched))
        shape = (blocks, 2, case.kv_heads, PAGE, HEAD_DIM)
        self.pools = [torch.randn(shape, device="cuda", dtype=dtype) for _ in range(self.count)]
        self.k = [pool[:, 0].transpose(1, 2) for pool in self.pools]
        self.v = [pool[:, 1].transpose(1, 2) for pool in self.pools]
        self.queries = [torch.randn(case.batch, Q_HEADS, HEAD_DIM, device="cuda", dtype=dtype) for _ in self.pools]
        self.new_kv = torch.randn(2, case.batch, case.kv_heads, HEAD_DIM, device="cuda", dtype=dtype)
        self.table = torch.randperm(blocks, device="cuda", dtype=torch.int32).view(case.batch, -1)
        self.lens = torch.full((case.batch,), case.tokens, device="cuda", dtype=torch.int32)
        self.slots = self.table[:, -1].long() * PAGE + PAGE - 1
        self.metadata = [
            torch.empty(blocks, case.kv_heads, 2, HEAD_DIM, device="cuda", dtype=dtype) for _ in self.pools
        ]
        for i in range(self.count):
            quest_ops.update_page_metadata(
                self.k[i], self.metadata[i], self.table, self.lens, torch.zeros_like(self.lens)
            )

    def quest(self, i: int, **options):
        pools = self.k[i], self.v[i], self.metadata[i], self.table, self.lens
        return quest_ops.quest_decode_attention(self.queries[i], *pools, BUDGET // PAGE, 1, 4, "max", **options)

    def us(self, call) -> float:
        """`call(i)` for each layer i."""
        return graph_us([lambda i=i: call(i) for i in range(self.count)])


def quest_times(layers: Layers) -> dict[str, float]:
    budget, q, k, v, m = BUDGET // PAGE, layers.queries, layers.k, layers.v, layers.metadata
    table, lens = layers.table, layers.lens
    scores = [quest_ops.estimate_page_scores(q[i], m[i], table, lens, PAGE, "max") for i in range(layers.count)]
    chosen = [quest_ops.select_topk_pages(s, lens, PAGE, budget, 1, 4) for s in scores]
    workspace = torch.zeros(quest_ops.ops.WORKSPACE_BYTES, dtype=torch.uint8, device="cuda")

    def separate(i):
        scores = quest_ops.estimate_page_scores(q[i], m[i], table, lens, PAGE, "max")
        page_ids, counts = quest_ops.select_topk_pages(scores, lens, PAGE, budget, 1, 4)
        quest_ops.sparse_decode_attention(q[i], k[i], v[i], table, lens, page_ids, counts)

    return {
        "append": layers.us(lambda i: quest_ops.append_paged_kv(*layers.new_kv, k[i], v[i], m[i], layers.slots)),
        "estimate": layers.us(lambda i: quest_ops.estimate_page_scores(q[i], m[i], table, lens, PAGE, "max")),
        "select": layers.us(lambda i: quest_ops.select_topk_pages(scores[i], lens, PAGE, budget, 1, 4)),
        "attend": layers.us(lambda i: quest_ops.sparse_decode_attention(q[i], k[i], v[i], table, lens, *chosen[i])),
        "separate": layers.us(separate),
        "quest": layers.us(lambda i: layers.quest(i, workspace=workspace)),
        "quest-no-workspace": layers.us(layers.quest),
        "dense": layers.us(lambda i: quest_ops.sparse_decode_attention(q[i], k[i], v[i], table, lens)),
    }


def flashinfer_us(layers: Layers) -> float | None:
    """The better of FlashInfer's two decode modes; None where it is not installed."""
    try:
        import flashinfer
    except ImportError:
        return None
    case, best = layers.case, math.inf
    blocks_each = case.tokens // PAGE
    indptr = torch.arange(case.batch + 1, dtype=torch.int32, device="cuda") * blocks_each
    last = torch.full((case.batch,), PAGE, dtype=torch.int32, device="cuda")
    for tensor_cores in (False, True):
        workspace = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
        wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "HND", use_tensor_cores=tensor_cores)
        dtype = layers.queries[0].dtype
        wrapper.plan(
            indptr,
            layers.table.flatten(),
            last,
            Q_HEADS,
            case.kv_heads,
            HEAD_DIM,
            PAGE,
            q_data_type=dtype,
            kv_data_type=dtype,
        )
        best = min(
            best,
            layers.us(
                lambda i, run=wrapper.run: run(layers.queries[i], (layers.pools[i][:, 0], layers.pools[i][:, 1]))
            ),
        )
    return best


def sdpa_us(layers: Layers) -> float:
    """torch's SDPA, its best backend, on a contiguous cache of the same size; a group's heads are query positions."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    case, best = layers.case, math.inf
    shape = (case.batch, case.kv_heads, case.tokens, HEAD_DIM)
    pairs = [pool.view(2, *shape) for pool in layers.pools]

    def attend(i):
        return F.scaled_dot_product_attention(layers.queries[i].view(*shape[:2], -1, HEAD_DIM), *pairs[i])

    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION):
        try:
            with sdpa_kernel(backend):
                best = min(best, layers.us(attend))
        except RuntimeError as error:  # a backend that does not take these shapes
            print(f"# {case.name}: {backend.name}: {str(error).splitlines()[0]}", file=sys.stderr)
    return best


def floor_us(case: Case) -> float:
    kept = min(BUDGET, case.tokens)
    vectors = case.kv_heads * (2 * math.ceil(case.tokens / PAGE) + 2 * kept) + 2 * Q_HEADS
    return FLOOR_START_US + case.batch * vectors * HEAD_DIM * 2 / FLOOR_BYTES_PER_US


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", action="append", choices=[c.name for c in CASES], help="only these cases")
    parser.add_argument("--dtype", choices=["float16", "bfloat16"], default="float16")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--csrc-tree", default="unknown", help="`git rev-parse HEAD:csrc` of the code that runs")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("needs a CUDA device; benchmarks/cpu_decode.py times the CPU kernels")

    rows = []
    paths = ["append", "estimate", "select", "attend", "separate", "quest-no-workspace", "quest", "dense"]
    columns = [*paths, "floor", "flashinfer", "sdpa", "ratio"]
    print(f"{'case':14}" + "".join(f"{c[-10:]:>11}" for c in columns))
    for case in CASES:
        if args.case and case.name not in args.case:
            continue
        layers = Layers(case, getattr(torch, args.dtype))
        times = quest_times(layers) | {
            "flashinfer": flashinfer_us(layers),
            "sdpa": sdpa_us(layers),
            "floor": floor_us(case),
        }
        peer = times["flashinfer"] or times["sdpa"]
        times["ratio"] = peer / times["quest"]
        print(
            f"{case.name:14}" + "".join(f"{times[c]:11.2f}" if times[c] is not None else f"{'-':>11}" for c in columns),
            flush=True,
        )
        shared = {
            "case": case.name,
            "metadata": "16",
            "page_size": PAGE,
            "dtype": args.dtype,
            "flashinfer_us": times["flashinfer"],
            "sdpa_us": times["sdpa"],
            "floor_us": times["floor"],
        }
        rows += [{**shared, "path": path, "us": times[path]} for path in paths]
        del layers
        torch.cuda.empty_cache()
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        record = {
            "gpu": torch.cuda.get_device_name(),
            "torch": torch.__version__,
            "command": "python " + " ".join(sys.argv),
            "csrc_tree": args.csrc_tree,
            "budget": BUDGET,
            "rows": rows,
        }
        args.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
