"""Times every op beside FlashInfer's dense decode, torch's SDPA and Quest put together from public parts, in one run.

    python benchmarks/kernels.py --json benchmarks/results/kernels-h100.json --figure kernels.png

A row is one path of one case; --extra times other shapes and settings, --quick small cases on the CPU. Columns:
- us: microseconds a layer on random data. On a GPU: CUDA graph over several layers' own pools, L2 cold, median of 20.
- GB/s: the bytes that the path must move (`counted_bytes` in cases.py) over its time.
- floor: 2.3 us + bytes / 2.95 TB/s, what scattered 16-byte loads reach on an H100.
- ratio: FlashInfer's dense decode over the path (SDPA where FlashInfer is not installed or not there, as on a CPU).

"estimate", "select" and "attend" are the separate ops, "separate" all three, "quest" the op in one call; "apart" is the
append and then "quest", "step" both in one call, and "step-cold" that with 256 MB read between layers. Dense paths
and peers are shown with the first page size of a case. "public", Quest of public parts, is timed in the main cases,
with pages of a block and metadata in the cache's dtype.
"""

import argparse
from dataclasses import replace

import peers
import phases
import record
import torch
from cases import CASES, EXTRA_CASES, PAGES, QUICK_CASES, Case, Layers, Pages, counted_bytes
from timing import release_memory

from quest_ops.cache import MAX_PAGES_PER_BLOCK

FLOOR_START_US, FLOOR_BYTES_PER_US = 2.3, 2.95e6
HEADER = f"{'case':22}{'path':20}{'page':>5}{'bits':>5}{'us':>10}{'GB/s':>8}{'floor':>9}{'ratio':>8}"


def floor_us(case: Case, path: str, pages: Pages) -> float:
    return FLOOR_START_US + counted_bytes(case, path, pages) / FLOOR_BYTES_PER_US


def check(layers: Layers) -> None:
    """Raises RuntimeError unless a workspace changes nothing and quest agrees with the separate ops, on one layer.

    The peers are compared with dense, before they are timed.
    """
    peers.check_close("dense with a workspace", layers.dense(0, workspace=layers.workspace), layers.dense(0))
    for pages in layers.case.pages:
        # A selection may differ where scores agree to rounding.
        separate = layers.separate(0, pages)
        peers.check_close(f"quest, {pages}", layers.quest(0, pages, workspace=layers.workspace), separate, 0.15)
        step = layers.step(0, pages)  # it writes the last token
        peers.check_close(f"step, {pages}", step, layers.quest(0, pages, workspace=layers.workspace))


def quest_times(layers: Layers, pages: Pages) -> dict[str, float]:
    scores = [layers.estimate(i, pages) for i in range(layers.count)]
    chosen = [layers.select(s, pages) for s in scores]
    times = {
        "append": layers.us(lambda i: layers.append(i, pages)),
        "estimate": layers.us(lambda i: layers.estimate(i, pages)),
        "select": layers.us(lambda i: layers.select(scores[i], pages)),
        "attend": layers.us(lambda i: layers.attend(i, *chosen[i], pages)),
        "separate": layers.us(lambda i: layers.separate(i, pages)),
        "quest": layers.us(lambda i: layers.quest(i, pages, workspace=layers.workspace)),
        "quest-no-workspace": layers.us(lambda i: layers.quest(i, pages)),
        "apart": layers.us(lambda i: (layers.append(i, pages), layers.quest(i, pages, workspace=layers.workspace))),
        "step": layers.us(lambda i: layers.step(i, pages)),
    }
    if layers.device != "cpu":
        times["step-cold"] = layers.after_reading_us(lambda i: layers.step(i, pages))
    return times


def other_times(layers: Layers, public: bool) -> dict[str, float | None]:
    """Our dense attention and the peers, which know no metadata of ours."""
    on_gpu = layers.device != "cpu"
    return {
        "dense": layers.us(lambda i: layers.dense(i, workspace=layers.workspace)),
        "dense-no-workspace": layers.us(layers.dense),
        "flashinfer": peers.flashinfer_us(layers) if on_gpu else None,
        "sdpa": peers.sdpa_us(layers),
        "public": peers.public_quest_us(layers) if on_gpu and public else None,
    }


def rows_of(
    case: Case,
    times: list[tuple[Pages, str, float]],
    on_gpu: bool,
    flashinfer: float | None,
    sdpa: float | None,
) -> list[dict]:
    peer = flashinfer or sdpa
    shared = {
        "case": case.name, "batch": case.batch, "context": case.context, "tokens": sum(case.lengths),
        "kv_heads": case.kv_heads, "query_heads": case.query_heads, "dtype": str(case.dtype).removeprefix("torch."),
        "layout": case.layout, "budget": case.budget, "block_size": case.block_size,
    }  # fmt: skip
    return [
        shared
        | {
            "path": path,
            "metadata": case.metadata_bits(pages),
            "page_size": pages.size,
            "us": us,
            "gbps": counted_bytes(case, path, pages) / us / 1e3,
            "floor_us": floor_us(case, path, pages) if on_gpu else None,
            "flashinfer_us": flashinfer,
            "sdpa_us": sdpa,
            "ratio": peer / us if peer else None,
        }
        for pages, path, us in times
    ]


def measure(case: Case, device: str, public: bool) -> list[dict]:
    layers = Layers(case, device)
    check(layers)
    others = other_times(layers, public)
    times = [(pages, path, us) for pages in case.pages for path, us in quest_times(layers, pages).items()]
    times += [(case.pages[0], path, us) for path, us in others.items() if us is not None]
    return rows_of(case, times, device != "cpu", others["flashinfer"], others["sdpa"])


def show(row: dict) -> None:
    floor, ratio = (f"{row[key]:.2f}" if row[key] is not None else "-" for key in ("floor_us", "ratio"))
    where = f"{row['case']:22}{row['path']:20}{row['page_size']:5}{row['metadata']:>5}"
    print(f"{where}{row['us']:10.2f}{row['gbps']:8.0f}{floor:>9}{ratio:>8}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--extra", action="store_true", help="other shapes and settings than the main cases")
    which.add_argument("--quick", action="store_true", help="small cases on the CPU, in under a minute")
    names = [case.name for case in [*CASES, *EXTRA_CASES, *QUICK_CASES]]
    parser.add_argument(
        "--case", action="append", choices=names, metavar="NAME", help="only this case; may be repeated"
    )
    parser.add_argument(
        "--pages", action="append", choices=PAGES, metavar="NAME",
        help=f"these instead of a case's own; may be repeated: {', '.join(PAGES)}",
    )  # fmt: skip
    parser.add_argument(
        "--phases", action="store_true", help="where the fused op spends its time instead; see phases.py"
    )
    record.add_arguments(parser)
    args = parser.parse_args()
    if args.phases and (args.figure or args.quick):
        parser.error("--phases goes with neither --figure nor --quick")
    if not args.quick and not torch.cuda.is_available():
        parser.error("needs a CUDA device; --quick times small cases on the CPU")

    cases = QUICK_CASES if args.quick else EXTRA_CASES if args.extra else CASES
    if args.case:
        cases = [case for case in [*QUICK_CASES, *CASES, *EXTRA_CASES] if case.name in args.case]
        if any((case in QUICK_CASES) != args.quick for case in cases):
            parser.error(
                f"with --quick, --case takes {', '.join(case.name for case in QUICK_CASES)}; without, the others"
            )
    if args.pages:
        chosen = tuple(PAGES[name] for name in args.pages)
        if wrong := [case.name for case in cases if any(case.block_size % pages.size for pages in chosen)]:
            parser.error(f"--pages {', '.join(args.pages)} do not divide the blocks of {', '.join(wrong)}")
        if wrong := [
            case.name for case in cases if any(case.block_size > MAX_PAGES_PER_BLOCK * pages.size for pages in chosen)
        ]:
            parser.error(
                f"--pages {', '.join(args.pages)}: more than {MAX_PAGES_PER_BLOCK} in a block of {', '.join(wrong)}"
            )
        cases = [replace(case, pages=chosen) for case in cases]
    device = "cpu" if args.quick else "cuda"
    if args.phases:
        try:
            clocks = phases.PhaseClocks()
        except RuntimeError as error:
            parser.error(str(error))
        what, rows = phases.WHAT, phases.measure(clocks, cases)
    else:
        what, rows, main_cases = "microseconds a layer", [], {case.name for case in CASES}
        print(HEADER)
        for case in cases:
            new = measure(case, device, public=case.name in main_cases)
            for row in new:
                show(row)
            rows += new
            release_memory()
    record.finish(args, device, {"what": what, "rows": rows})


if __name__ == "__main__":
    main()
