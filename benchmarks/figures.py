"""Draws the results of kernels.py, break_even.py, end_to_end.py and accuracy.py, from their JSON.

python benchmarks/figures.py benchmarks/results/kernels-h100.json kernels.png
"""

import argparse
import json
from collections import defaultdict
from pathlib import Path

TICKS = tuple(2**i for i in range(6, 21))
# What a line is called, the rows it takes and its style, in the order of the legend.
LINES = {
    "FlashInfer dense": ({"path": "flashinfer"}, {"color": "tab:orange", "marker": "o"}),
    "torch SDPA": ({"path": "sdpa"}, {"color": "tab:brown", "marker": "v"}),
    "Quest of public parts": ({"path": "public"}, {"color": "tab:purple", "marker": "s"}),
    "our dense": ({"path": "dense"}, {"color": "tab:green", "marker": "^"}),
    "our separate ops": ({"path": "separate", "wide": True}, {"color": "tab:cyan", "marker": "D"}),
    "quest": ({"path": "quest", "wide": True}, {"color": "tab:blue", "marker": "o"}),
    "quest, 8-bit metadata": ({"path": "quest", "metadata": "8", "page_size": 16}, {"color": "tab:red", "marker": "o"}),
    "quest, 8-bit metadata, pages of 8": (
        {"path": "quest", "metadata": "8", "page_size": 8},
        {"color": "tab:pink", "marker": "x"},
    ),
    **{
        f"quest, 4-bit metadata, pages of {size}": (
            {"path": "quest", "metadata": "4", "page_size": size},
            {"color": color, "marker": "x"},
        )
        for size, color in ((16, "tab:olive"), (8, "tab:gray"), (4, "black"))
    },
}
NARROW = "8", "4"  # bits of metadata that is not in the cache's dtype
# Of Quest's lines with such metadata, by its bits and the page size; others have ATTENTIONS' color.
COLORS = {("8", 16): "tab:red", ("8", 8): "tab:pink", ("8", 32): "tab:pink", ("4", 8): "tab:gray", ("4", 4): "black"}
# The attentions of end_to_end.py, in the order of the legend.
ATTENTIONS = {"quest": "tab:blue", "dense": "tab:green", "flashinfer": "tab:orange", "sdpa": "tab:brown"}


def label(attention: str, metadata: str, dense_layers: int, select_every: int = 1, page_size: int = 16) -> str:
    """What a row of end_to_end.py is called."""
    if attention != "quest":
        return attention
    attention += f", {metadata}-bit metadata" * (metadata in NARROW) + f", pages of {page_size}" * (page_size != 16)
    attention += f", {dense_layers} dense layers" * (dense_layers > 0)
    return attention + f", select every {select_every}" * (select_every > 1)


def label_of(row: dict) -> str:
    """The label of a row in a file; older ones say nothing of select_every and page_size."""
    later = row.get("select_every", 1), row.get("page_size", 16)
    return label(row["attention"], row["metadata"], row["dense_layers"], *later)


def draw(record: dict, path: Path) -> None:
    """Raises ValueError where the record holds nothing to draw."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = record["rows"]
    first = rows[0] if rows else {}
    kind = (
        _break_even if "speedup" in first else
        _end_to_end if "attention" in first else
        _fidelity if "error_by_layer" in first else
        _accuracy if "policy" in first else
        _kernels
    )  # fmt: skip
    panels = kind(rows)
    if not panels:
        raise ValueError("nothing to draw: the rows are of none of the benchmarks")
    figure, axes = pyplot.subplots(1, len(panels), figsize=(6 * len(panels), 5), squeeze=False, layout="constrained")
    for axis, (title, label, lines) in zip(axes[0], panels):
        if kind is _end_to_end and len({x for _, points, _ in lines for x, _ in points}) == 1:
            _bars(axis, title, label, lines)
            continue
        for name, points, style in lines:
            axis.plot(*zip(*sorted(points)), label=name, markersize=4, **style)
        axis.set_yscale("log" if kind in (_kernels, _break_even) else "linear")
        if kind is not _fidelity:
            axis.set_xscale("log", base=2)
            places = sorted({x for _, points, _ in lines for x, _ in points})
            ticks = [tick for tick in TICKS if places[0] <= tick <= places[-1]]
            axis.set_xticks(ticks, [f"{tick // 1024}K" if tick >= 1024 else str(tick) for tick in ticks])
            axis.set_xticks([], minor=True)
        xlabel = {_accuracy: "budget, tokens", _fidelity: "layer"}.get(kind, "context, tokens")
        axis.set(title=title, xlabel=xlabel, ylabel=label)
        axis.yaxis.set_major_formatter("{x:g}")
        if kind is _end_to_end:
            axis.set_ylim(0, None)
        axis.grid(alpha=0.3)
    for axis in axes[0] if kind is _end_to_end else axes[0][:1]:  # only there lines differ from panel to panel
        if axis.lines:
            axis.legend(fontsize=8)
    figure.suptitle(f"{record['gpu'] or record['cpu']}, torch {record['torch']}", fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _bars(axis, title: str, label: str, lines: list[tuple]) -> None:
    """What has one context only."""
    names = [name for name, _, _ in lines]
    bars = axis.barh(names, [points[0][1] for _, points, _ in lines], color=[style["color"] for _, _, style in lines])
    axis.bar_label(bars, fmt="%.2f", padding=3, fontsize=8)
    axis.invert_yaxis()
    axis.margins(x=0.12)
    axis.tick_params(axis="y", labelsize=8)
    axis.set(title=f"{title}, {lines[0][1][0][0] // 1024}K", xlabel=label)


def _kernels(rows: list[dict]) -> list[tuple]:
    """Time against context, a panel for each shape that has several contexts (or for each, where none has)."""
    shapes = defaultdict(list)
    for row in rows:
        same = "batch", "kv_heads", "query_heads", "dtype", "layout", "budget", "block_size"
        if row.get("path") and row["context"] * row["batch"] == row["tokens"]:
            shapes[tuple(row[key] for key in same)].append(row)
    curves = {shape: found for shape, found in shapes.items() if len({row["context"] for row in found}) > 1}
    panels = []
    for (batch, kv_heads, query_heads, dtype, *_), found in (curves or shapes).items():
        lines = [
            (name, [(row["context"], row["us"]) for row in found if _matches(row, wanted)], style)
            for name, (wanted, style) in LINES.items()
        ]
        lines += [
            (f"floor: {name}", [(r["context"], r["floor_us"]) for r in found if _matches(r, LINES[name][0])],
             {"color": LINES[name][1]["color"], "linestyle": "--"})
            for name in ("our dense", "quest", "quest, 8-bit metadata")
        ]  # fmt: skip
        lines = [line for line in lines if line[1] and all(y is not None for _, y in line[1])]
        title = f"{query_heads} query heads, {kv_heads} KV heads, batch {batch}, {dtype}"
        panels.append((title, "microseconds a layer", lines))
    return panels


def _matches(row: dict, wanted: dict) -> bool:
    wide = wanted.get("wide", False)  # metadata in the cache's dtype
    return all(row[key] == value for key, value in wanted.items() if key != "wide") and not (
        wide and row["metadata"] in NARROW
    )


def _break_even(rows: list[dict]) -> list[tuple]:
    """FlashInfer's time (ours, dense, where it is not there) over quest's, a panel for each group size."""
    groups = defaultdict(lambda: defaultdict(list))
    for row in rows:
        groups[row["group"]][row["batch"]].append((row["context"], row["speedup"]))
    return [
        (f"{group} query head{'s' * (group > 1)} a KV head", "dense decode / quest",
         [(f"batch {batch}", points, {"marker": "o"}) for batch, points in batches.items()])
        for group, batches in groups.items()
    ]  # fmt: skip


def _end_to_end(rows: list[dict]) -> list[tuple]:
    """Milliseconds a token of each sequence against context, a panel for each model and batch. Where Quest has several
    budgets its lines are called by them too."""
    budgets = sorted({row["budget"] for row in rows})
    panels = defaultdict(lambda: defaultdict(list))
    for row in sorted(rows, key=lambda row: list(ATTENTIONS).index(row["attention"])):
        shape = tuple(row[key] for key in ("model", "batch", "weights"))
        tells_budget = len(budgets) > 1 and row["attention"] == "quest"
        panels[shape][label_of(row) + f", budget {row['budget']}" * tells_budget].append(row)

    def style(row: dict) -> dict:
        color, line, marker = ATTENTIONS[row["attention"]], "-", "o"
        if row["attention"] == "quest":
            every = row.get("select_every", 1)
            color = COLORS.get((row["metadata"], row.get("page_size", 16)), color)
            line = ":" if every > 1 else "--" if row["dense_layers"] else "-"
            marker = {1: "o", 2: "s", 4: "^"}.get(every, "x")
        return {"color": color, "marker": marker, "linestyle": line}

    return [
        (
            f"{model}, batch {batch}, {weights}" + f", budget {budgets[0]}" * (len(budgets) == 1),
            "milliseconds a token",
            [(name, [(r["context"], r["ms"]) for r in same], style(same[0])) for name, same in found.items()],
        )
        for (model, batch, weights), found in sorted(panels.items())
    ]


def _accuracy(rows: list[dict]) -> list[tuple]:
    """Added loss, or the share of answers found, against the budget, a panel for each context."""
    value, label = (
        ("added_loss", "added loss, nats a token") if "added_loss" in rows[0] else ("found", "share of answers found")
    )
    panels = defaultdict(lambda: defaultdict(list))
    for row in rows:
        panels[row["context"]][row["policy"]].append((row["budget"], row[value]))
    return [
        (f"after {context} tokens", label, [(name, points, {"marker": "o"}) for name, points in policies.items()])
        for context, policies in panels.items()
    ]


def _fidelity(rows: list[dict]) -> list[tuple]:
    """Error and kept mass by layer, a panel of each for each context and budget."""
    panels = defaultdict(list)
    for row in rows:
        for value, label in (("error_by_layer", "relative error of the output"), ("mass_by_layer", "true mass kept")):
            title = f"budget {row['budget']} after {row['context']} tokens"
            panels[title, label].append((row["policy"], list(enumerate(row[value])), {"marker": "o"}))
    return [(title, label, lines) for (title, label), lines in panels.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("json", type=Path)
    parser.add_argument("png", type=Path)
    args = parser.parse_args()
    draw(json.loads(args.json.read_text()), args.png)


if __name__ == "__main__":
    main()
