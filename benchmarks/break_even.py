"""From which context on Quest pays, by batch and query heads a KV head, on a GPU.

    python benchmarks/break_even.py --json benchmarks/results/break-even-h100.json --figure break-even.png

Times the op in one call (32 query heads, float16, pages of 16, budget 2,048) beside our dense attention and
FlashInfer's, all three as in kernels.py. A break-even context is the one from which on Quest is faster by more than 2%,
which is what two runs differ by; between two measured contexts it is interpolated, both axes logarithmic.
"""

import argparse
import itertools
import math

import peers
import record
import torch
from cases import Case, Layers, Pages
from timing import release_memory

CONTEXTS = [1024 * 2**i for i in range(8)]
BATCHES, GROUPS, QUERY_HEADS = (1, 8, 32), (1, 4, 8), 32
MOST_BYTES = 50e9  # of one layer
GAIN = 1.02


def break_even_context(contexts: list[int], speedups: list[float]) -> float | None:
    """The context from which on the speed-up stays above GAIN; None: not up to the longest. Contexts ascend.

    The shortest context where it is above throughout.
    """
    losing = [i for i, speedup in enumerate(speedups) if speedup <= GAIN]
    if not losing:
        return float(contexts[0])
    i = losing[-1]
    if i == len(contexts) - 1:
        return None
    below, above = (math.log(speedup / GAIN) for speedup in speedups[i : i + 2])
    return contexts[i] * (contexts[i + 1] / contexts[i]) ** (below / (below - above))


def measure(group: int, batch: int, context: int) -> dict | None:
    """None where a layer is too large."""
    case = Case(
        f"group{group}-{context // 1024}k-b{batch}", (context,) * batch, QUERY_HEADS // group, QUERY_HEADS, (Pages(16),)
    )
    if 2 * sum(case.lengths) * case.kv_heads * 256 > MOST_BYTES:
        return None
    layers = Layers(case)
    quest = layers.us(lambda i: layers.quest(i, workspace=layers.workspace))
    dense = layers.us(lambda i: layers.dense(i, workspace=layers.workspace))
    flashinfer = peers.flashinfer_us(layers)
    return {
        "case": case.name, "group": group, "batch": batch, "context": context, "quest_us": quest, "dense_us": dense,
        "flashinfer_us": flashinfer, "speedup": (flashinfer or dense) / quest,
    }  # fmt: skip


def summarise(rows: list[dict]) -> list[dict]:
    """Of each group size and batch the break-even context with our dense attention and with FlashInfer's."""
    curves = []
    for (group, batch), found in itertools.groupby(rows, key=lambda row: (row["group"], row["batch"])):
        found = list(found)
        curve = {"group": group, "batch": batch, "shortest": found[0]["context"], "longest": found[-1]["context"]}
        for peer in ("dense", "flashinfer"):
            times = [row[f"{peer}_us"] for row in found]
            known = None not in times
            speedups = [time / row["quest_us"] for time, row in zip(times, found)] if known else []
            curve[peer] = break_even_context([row["context"] for row in found], speedups) if known else "not measured"
        curves.append(curve)
    return curves


def text(curve: dict, peer: str) -> str:
    value = curve[peer]
    if isinstance(value, str):
        return value
    if value is None:
        return f"above {curve['longest']}"
    return f"{value:.0f}" if value > curve["shortest"] else f"{curve['shortest']} or less"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    record.add_arguments(parser)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("needs a CUDA device")
    rows = []
    print(f"{'case':20}{'quest us':>11}{'dense us':>11}{'FlashInfer us':>15}{'speed-up':>10}")
    for group, batch, context in itertools.product(GROUPS, BATCHES, CONTEXTS):
        row = measure(group, batch, context)
        if row is None:
            print(
                f"# group {group}, batch {batch}, {context} tokens: a layer is over {MOST_BYTES / 1e9:.0f} GB",
                flush=True,
            )
            continue
        flashinfer = "-" if row["flashinfer_us"] is None else f"{row['flashinfer_us']:.2f}"
        print(
            f"{row['case']:20}{row['quest_us']:11.2f}{row['dense_us']:11.2f}{flashinfer:>15}{row['speedup']:10.2f}",
            flush=True,
        )
        rows.append(row)
        release_memory()
    curves = summarise(rows)
    print(f"\nbreak-even context\n{'group':>6}{'batch':>7}{'with our dense':>18}{'with FlashInfer':>18}")
    for curve in curves:
        print(f"{curve['group']:6}{curve['batch']:7}{text(curve, 'dense'):>18}{text(curve, 'flashinfer'):>18}")
    record.finish(args, "cuda", {"gain": GAIN, "break_even": curves, "rows": rows})


if __name__ == "__main__":
    main()
