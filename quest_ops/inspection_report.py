"""The `quest-ops inspect` command: pictures of what Quest chooses and misses, a JSON file, a table."""

from __future__ import annotations

import io
import json
import math
import os
import tempfile
from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn.functional as F

from quest_ops.config import QuestConfig, check_int
from quest_ops.inspection import Inspection, inspect_prompt

# Of the picture of pages: a panel a layer, with a band of rows for each head. What is more than fits is drawn together.
MAX_PANEL_ROWS, MIN_BAND_ROWS, MAX_PANEL_COLUMNS = 96, 4, 320
DPI = 110


def draw_pages(inspection: Inspection, unit: str) -> bytes:
    """A PNG with a panel for each layer: pages from left to right, a band for each head, in it steps from the top down.

    unit: what the heads that choose are called.
    """
    plt = pyplot()
    chosen = inspection.chosen()
    steps, layers, heads, pages = chosen.shape
    band, width = min(steps, max(MIN_BAND_ROWS, MAX_PANEL_ROWS // heads)), min(pages, MAX_PANEL_COLUMNS)
    columns = math.ceil(math.sqrt(0.8 * layers))
    rows = math.ceil(layers / columns)
    size = columns * (0.4 + 2 * width / DPI), rows * (0.5 + 2 * heads * band / DPI) + 1
    figure, axes = plt.subplots(
        rows, columns, figsize=(max(size[0], 8), max(size[1], 5)), sharex=True, sharey=True, squeeze=False,
        layout="constrained",
    )  # fmt: skip
    missed = inspection.missed.mean((0, 2))
    for i, axis in enumerate(axes.flat):
        if i >= layers:
            axis.set_axis_off()
            continue
        shares = F.adaptive_max_pool2d(chosen[:, i].transpose(0, 1).float(), (steps, width))
        shares = F.adaptive_avg_pool2d(shares, (band, width))[..., None]  # [heads, band, width, 1]
        picture = 1 - shares * (1 - torch.tensor(colors(heads))[:, None, None])
        axis.imshow(
            picture.flatten(0, 1).numpy(), aspect="auto", interpolation="nearest", extent=(-0.5, pages - 0.5, heads, 0)
        )
        for head in range(1, heads):
            axis.axhline(head, color="black", linewidth=0.5)
        axis.set_title(f"layer {inspection.layers[i]}: misses {missed[i]:.0%}", fontsize=9)
        axis.set_xlim(-0.01 * pages - 1, 1.01 * pages)  # so that the frame covers neither the first page nor the last
        labelled = range(0, heads, -(-heads // 10))
        axis.set_yticks([head + 0.5 for head in labelled], labelled, fontsize=8)
        axis.tick_params(labelbottom=i + columns >= layers)
    axes[0, 0].xaxis.get_major_locator().set_params(integer=True)
    quest = inspection.quest
    together = ""
    if pages > width or steps > band:
        together = (
            f"\na dot is about {pages / width:.0f} pages and {steps / band:.0f} steps, the darker the more of these "
            "steps chose any of them"
        )
    figure.supxlabel(
        f"page of {quest.page_size} tokens; the first {quest.sink_pages} (sink) and the last {quest.recent_pages} "
        f"(recent) are always kept{together}",
        fontsize=10,
    )
    figure.supylabel(f"{unit}; in each band {steps} decode steps, from the top down", fontsize=10)
    figure.suptitle(
        f"Pages that Quest chose among {pages}, {budget_of(inspection)} for each layer, head and step;\n"
        "above each layer, the share of the true attention mass that they miss",
        fontsize=11,
    )
    return png(figure)


def draw_fidelity(inspection: Inspection, unit: str) -> bytes:
    """A PNG of missed mass and output error by layer, with their spread over steps and heads."""
    from matplotlib.ticker import PercentFormatter

    plt = pyplot()
    rows, heads = inspection.by_layer(), inspection.pages.size(2)
    figure, panels = plt.subplots(2, 1, figsize=(11, 8), sharex=True, layout="constrained")
    titles = (
        ("missed_mass", "true attention mass that the chosen pages miss"),
        ("output_error", "relative error of the attention's output"),
    )
    for axis, (name, label) in zip(panels, titles):
        low, high = zip(*(row[f"{name}_of_steps"] for row in rows))
        axis.fill_between(inspection.layers, low, high, color="black", alpha=0.15, label="steps, 10% to 90%")
        by_head = torch.tensor([row[f"{name}_by_head"] for row in rows]).unflatten(1, (heads, -1))
        for head, color in enumerate(colors(heads)):
            for query_head in by_head[:, head].unbind(1):
                axis.plot(inspection.layers, query_head, "o", color=color, markersize=3, alpha=0.7)
            if heads <= 10:
                axis.plot([], [], "o", color=color, markersize=3, label=f"{unit} {head}")
        axis.plot(inspection.layers, [row[name] for row in rows], color="black", label="layer")
        axis.set_ylabel(label)
        axis.set_ylim(0, None)
        axis.yaxis.set_major_formatter(PercentFormatter(1))
        axis.grid(alpha=0.3)
    panels[0].legend(fontsize=8, ncols=3)
    panels[1].set_xlabel("layer; a dot for each query head, in the colour that its pages have in pages.png")
    panels[1].xaxis.get_major_locator().set_params(integer=True)
    return png(figure)


def budget_of(inspection: Inspection) -> str:
    """How many pages were chosen: of any layer, head and step, or from the fewest to the most."""
    fewest, most = inspection.chosen().sum(-1).aminmax()
    return f"{fewest}" if fewest == most else f"{fewest} to {most}"


def colors(heads: int) -> list[tuple[float, ...]]:
    """A colour for each head."""
    from matplotlib import colormaps

    return [colormaps["tab10"](head % 10)[:3] for head in range(heads)]


def pyplot():
    """matplotlib's, for drawing without a screen."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    return plt


def png(figure) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=DPI)
    pyplot().close(figure)
    return file.getvalue()


def check_folder(out: Path) -> None:
    """Raises OSError where no folder `out` can be made or written to."""
    existing = next(path for path in (out.absolute(), *out.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise NotADirectoryError(f"--out {out}: {existing} is a file, and must be a folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise PermissionError(f"--out {out}: {existing} cannot be written to")


def write(out: Path, files: dict[str, bytes]) -> None:
    """Writes files into a folder, which is made, so that none is ever there in part."""
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out, prefix="inspect-") as aside:
        for name, content in files.items():
            (Path(aside) / name).write_bytes(content)
        for name in files:
            os.replace(Path(aside) / name, out / name)


def print_table(inspection: Inspection) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table()
    for heading in ("layer", "missed mass", "by head", "output error", "by head", "distinct pages"):
        table.add_column(heading, justify="right", no_wrap=True)

    def cells(row: dict, name: str) -> tuple[str, str]:
        by_head = row[f"{name}_by_head"]
        return f"{row[name]:.1%}", f"{100 * min(by_head):.0f} - {max(by_head):.0%}"

    rows = inspection.by_layer()
    for row in rows:
        shares = *cells(row, "missed_mass"), *cells(row, "output_error")
        table.add_row(str(row["layer"]), *shares, f"{row['distinct_pages']:.0f}")
    table.add_section()
    missed, error, distinct = (
        sum(row[name] for row in rows) / len(rows) for name in ("missed_mass", "output_error", "distinct_pages")
    )
    table.add_row("mean", f"{missed:.1%}", "", f"{error:.1%}", "", f"{distinct:.0f}")
    Console(highlight=False).print(table)


def run(*, model: str, text: str, quest: QuestConfig, new_tokens: int, device: str, out: Path) -> None:
    """The `quest-ops inspect` command: prints the table; pages.png, fidelity.png and inspect.json go into `out`.

    Raises ValueError for a prompt or settings that do not fit the model or each other, OSError for an `out` that is no
    folder, and what `Llama.load` raises for a model that cannot be read; then nothing has been written.
    """
    from rich.console import Console

    from quest_ops.llama.model import Llama
    from quest_ops.progress import ProgressBars

    check_int("--new-tokens", new_tokens, 1)
    check_folder(out)
    with ProgressBars() as bars:
        llama, tokenizer = Llama.load(model, device=device, progress=bars.bytes("loading the model"))
        found = inspect_prompt(llama, tokenizer.encode(text), quest, new_tokens, bars.phases("inspect"))
    dtype = str(llama.dtype).removeprefix("torch.")
    unit = "query head" if quest.head_reduction == "none" else "KV head"
    record = {
        "model": Path(model).name,
        "dtype": dtype,
        "device": str(llama.device),
        "quest": {k: str(v) if isinstance(v, torch.dtype) else v for k, v in asdict(quest).items()},
        "prompt_tokens": found.prompt_tokens,
        "steps": new_tokens,
        "text": tokenizer.decode(found.tokens),
        "pages": found.num_pages,
        "layers": found.by_layer(),
    }
    files = {
        "pages.png": draw_pages(found, unit),
        "fidelity.png": draw_fidelity(found, unit),
        "inspect.json": (json.dumps(record, indent=1) + "\n").encode(),
    }
    write(out, files)
    console = Console(highlight=False)
    console.print(
        f"{new_tokens} decode steps after {found.prompt_tokens} tokens, {budget_of(found)} of {found.num_pages} pages "
        f"each; {record['model']}, {dtype} on {record['device']}",
        soft_wrap=True,
    )
    print_table(found)
    console.print(f"Pictures and numbers: {', '.join(str(out / name) for name in files)}", soft_wrap=True)
