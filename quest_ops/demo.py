"""The demo: SmolLM2 reads a long text with a pass key hidden in it, and answers with dense and with Quest attention."""

from __future__ import annotations

import itertools
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch

from quest_ops.config import QuestConfig
from quest_ops.llama.generate import Generation, Generator
from quest_ops.llama.model import Llama
from quest_ops.llama.tokenizer import Tokenizer

KEY = "49368"
KEY_PARAGRAPH = (
    f"\n\nThe secret pass key is {KEY}. Remember it: the secret pass key is {KEY}. "
    f"Again, the secret pass key is {KEY}.\n\n"
)
QUESTION = "\n\nNow, what is the secret pass key? The secret pass key is"

# The chosen pages are recorded in the first decode steps, which write the key, and the later ones are timed: recording
# takes time too.
RECORDED_STEPS = 8
MIN_NEW_TOKENS = RECORDED_STEPS + 5


@dataclass(frozen=True)
class Prompt:
    """tokens: the prompt. key_tokens: where in it the paragraph with the key lies."""

    tokens: list[int]
    key_tokens: range


@dataclass(frozen=True)
class Answer:
    """What one kind of attention made of the prompt. Times are in seconds, of one decode step where not said otherwise.

    graph_step_seconds: on a GPU, a step as a CUDA graph, in which Generator runs it; None on a CPU.
    """

    text: str
    right: bool
    prefill_seconds: float
    step_seconds: float
    attention_seconds: float
    graph_step_seconds: float | None
    generation: Generation


def default_text() -> str:
    """The reference pages of the Python language that every CPython ships, 465,000 characters."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics.values())


def make_prompt(tokenizer: Tokenizer, text: str, tokens: int) -> Prompt:
    """`tokens` tokens: the beginning of the text with the key paragraph in its middle, and the question.

    Raises ValueError where the text is too short, or `tokens` too few for the key and the question.
    """
    key, question = tokenizer.encode(KEY_PARAGRAPH, add_special=False), tokenizer.encode(QUESTION, add_special=False)
    body = tokenizer.encode(text)
    space = tokens - len(key) - len(question)
    if space < 2:
        raise ValueError(f"--tokens must be at least {len(key) + len(question) + 2}, got {tokens}")
    if len(body) < space:
        raise ValueError(f"the text has {len(body)} tokens; --tokens {tokens} needs {space} of it")
    middle = space // 2
    return Prompt(body[:middle] + key + body[middle:space] + question, range(middle, middle + len(key)))


def answer(
    model: Llama,
    tokenizer: Tokenizer,
    prompt: Prompt,
    attention: str,
    quest: QuestConfig,
    new_tokens: int,
    progress: Callable[[str, int, int], None] | None = None,
) -> Answer:
    """Reads the prompt and generates greedily, with "dense" or "quest" decode steps."""
    tokens = len(prompt.tokens) + new_tokens
    generator = Generator(model, attention=attention, quest=quest, max_sequence_tokens=tokens, compile=False)
    arrivals = []

    def generate(**watch) -> Generation:
        arrivals.clear()
        return generator.generate(
            [prompt.tokens],
            new_tokens,
            stop_tokens=(),
            on_token=lambda *_: arrivals.append(time.perf_counter()),
            progress=progress,
            **watch,
        )[0]

    def step_seconds(first: int) -> float:
        return median(b - a for a, b in itertools.pairwise(arrivals[first:]))

    generation = generate(profile_attention=True, record_pages=range(RECORDED_STEPS))
    step, graph_step = step_seconds(RECORDED_STEPS), None
    if model.device.type == "cuda":
        generate()
        graph_step = step_seconds(2)  # the graph is captured in the first step
    text = tokenizer.decode(generation.tokens)
    number = re.search(r"\d+", text)
    return Answer(
        text=text,
        right=number is not None and number[0] == KEY,
        prefill_seconds=generation.prefill_seconds,
        step_seconds=step,
        attention_seconds=generation.decode_attention_seconds / generation.decode_steps,
        graph_step_seconds=graph_step,
        generation=generation,
    )


def table_rows(dense: Answer, quest: Answer) -> list[tuple[str, str, str, str]]:
    """(what, dense, Quest, dense / Quest) for each row of the demo's table."""

    def row(what: str, value: Callable[[Answer], float], form: str) -> tuple[str, str, str, str]:
        a, b = value(dense), value(quest)
        return what, form.format(a), form.format(b), f"{a / b:.2f}x"

    rows = [
        ("answer", *(" ".join(x.text.split())[:20] for x in (dense, quest)), ""),
        ("the key is", *("right" if x.right else "wrong" for x in (dense, quest)), ""),
        ("prefill, s", *(f"{x.prefill_seconds:.2f}" for x in (dense, quest)), ""),  # dense attention in both
        row("ms a token", lambda x: x.step_seconds * 1e3, "{:.2f}"),
        row("  in attention", lambda x: x.attention_seconds * 1e3, "{:.2f}"),
    ]
    if dense.graph_step_seconds is not None:
        rows.append(row("  as CUDA graph", lambda x: x.graph_step_seconds * 1e3, "{:.2f}"))
    rows.append(row("KV bytes read", lambda x: x.generation.kv_read_share, "{:.0%}"))
    return rows


def page_shares(generation: Generation, num_pages: int) -> torch.Tensor:
    """[steps, layers, pages] float32: the share of KV heads that chose a page, in each recorded step and layer."""
    steps, layers = (1 + max(key[i] for key in generation.pages) for i in (0, 1))
    shares = torch.zeros(steps, layers, num_pages + 1)  # the last column takes the padding, -1
    for (step, layer), ids in generation.pages.items():
        for head in ids:
            shares[step, layer, head.long()] += 1 / len(ids)
    return shares[..., :num_pages]


def draw_pages(path: Path, generation: Generation, prompt: Prompt, quest: QuestConfig, token_texts: list[str]) -> None:
    """Draws which pages the layers chose in the recorded steps, with the key's pages marked.

    token_texts: the text of each new token; step i reads token i and writes token i + 1.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    num_pages = -(-(len(prompt.tokens) + RECORDED_STEPS) // quest.page_size)
    shares = page_shares(generation, num_pages)
    key_pages = [prompt.key_tokens[0] // quest.page_size, prompt.key_tokens[-1] // quest.page_size]

    figure, (layers, steps) = plt.subplots(
        2, 1, figsize=(13, 8), height_ratios=[shares.size(1), 1.8 * len(shares)], sharex=True, layout="constrained"
    )
    for axes, picture, label in ((layers, shares.mean(0), "layer"), (steps, shares.mean(1), "token written")):
        image = axes.imshow(picture.numpy(), aspect="auto", cmap="viridis", vmin=0, vmax=1, interpolation="nearest")
        axes.axvspan(key_pages[0] - 0.5, key_pages[1] + 0.5, fill=False, edgecolor="red", linewidth=1.5)
        axes.set_ylabel(label)
    layers.annotate(
        f"the key: pages {key_pages[0]} to {key_pages[1]}",
        (sum(key_pages) / 2, -0.5),
        xytext=(0, 12),
        textcoords="offset points",
        ha="center",
        color="red",
        arrowprops={"arrowstyle": "-", "color": "red"},
    )
    steps.set_yticks(range(len(shares)), [repr(text) for text in token_texts[1 : len(shares) + 1]])
    steps.set_xlabel(
        f"page of {quest.page_size} tokens; the first {quest.sink_pages} (sink) and the last {quest.recent_pages} "
        "(recent) are always kept"
    )
    figure.suptitle(
        f"Pages that Quest chose among {num_pages}, {quest.page_budget} for each layer and KV head; above by layer, "
        "below by step"
    )
    figure.colorbar(image, ax=[layers, steps], label="share of choices (KV heads, and steps or layers)", pad=0.01)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def run(*, tokens: int, token_budget: int, text: str, new_tokens: int, device: str, out: Path) -> None:
    """The `quest-ops demo` command: prints the table, and writes the picture to `out`.

    Raises ValueError for sizes that do not fit the model, FileNotFoundError where the folder of `out` is not there,
    RuntimeError where SmolLM2 cannot be fetched.
    """
    from rich.console import Console
    from rich.table import Table

    from quest_ops.llama.smollm2 import fetch_smollm2
    from quest_ops.progress import ProgressBars

    # Also where dense attention is faster: what Quest chooses is to be seen.
    quest = QuestConfig(token_budget=token_budget, dense_below=token_budget)
    if new_tokens < MIN_NEW_TOKENS:
        raise ValueError(f"--new-tokens must be at least {MIN_NEW_TOKENS}, got {new_tokens}")
    if not out.parent.is_dir():
        raise FileNotFoundError(f"--out {out}: there is no folder {out.parent}")
    with ProgressBars() as bars:
        path = fetch_smollm2(bars.bytes("fetching SmolLM2-135M-Instruct"))
        model, tokenizer = Llama.load(path, device=device, progress=bars.bytes("reading its weights"))
        positions = model.config.max_position_embeddings
        if tokens + new_tokens > positions:
            raise ValueError(
                f"--tokens {tokens} and --new-tokens {new_tokens} are more than the model's {positions} positions: "
                f"--tokens must be at most {positions - new_tokens}"
            )
        prompt = make_prompt(tokenizer, text, tokens)
        answers = [
            answer(model, tokenizer, prompt, attention, quest, new_tokens, bars.phases(attention))
            for attention in ("dense", "quest")
        ]
    dense, sparse = answers

    table = Table()
    for heading, justify in (("", "left"), ("dense", "right"), ("Quest", "right"), ("dense/Quest", "right")):
        table.add_column(heading, justify=justify, no_wrap=True)
    for row in table_rows(dense, sparse):
        table.add_row(*row)
    console = Console(highlight=False)
    console.print(
        f"A text of {tokens} tokens, the pass key {KEY} on page {prompt.key_tokens[0] // quest.page_size} of "
        f"{-(-tokens // quest.page_size)}. Quest reads {token_budget} tokens a step.\n"
        f"SmolLM2-135M-Instruct, {model.dtype} on {model.device}".replace("torch.", ""),
        soft_wrap=True,
    )
    console.print(table)
    if not sparse.generation.pages:
        console.print(
            f"No picture: the budget of {token_budget} tokens holds all {tokens}, so every page is read.",
            soft_wrap=True,
        )
        return
    token_texts = [tokenizer.decode([token]) for token in sparse.generation.tokens]
    draw_pages(out, sparse.generation, prompt, quest, token_texts)
    console.print(f"Which pages each layer chose: {out}", soft_wrap=True)
