"""Times one decode step of the reference decoder, from token to greedy token, with each kind of attention in turn.

    python benchmarks/end_to_end.py --json benchmarks/results/end_to_end-h100.json --figure end_to_end.png
    python benchmarks/end_to_end.py --model llama-2-7b --weights int4 --policy minmax-8bit default --dense-layers 0 2
    python benchmarks/end_to_end.py --quick --json benchmarks/results/end_to_end-cpu.json

Attention is Quest, this library's dense paged attention, FlashInfer's (on a GPU, where installed) or torch's SDPA on
contiguous keys and values; nothing else differs. Weights are random but for smollm2 and --checkpoint, keys and values
always. All attentions are first compared, layer by layer, on a context that Quest's budget covers. On a GPU the step is
one CUDA graph (median of 20 replays; planning, which the host does while the GPU works, is not in it), with its small
operations compiled for each batch size; on the CPU it is plain calls, planning included, and the fastest of 40. With
--select-every N Quest chooses pages in every N-th step, for all sequences in the same one: the time is the mean of one
step that chooses and N - 1 that do not (on a GPU of a graph of each kind).

--policy says what Quest's pages are: "default" those of QuestConfig, 8 tokens and two points of the keys in 4 bits;
"minmax" 16 tokens, minimum and maximum in the cache's dtype, as in the paper; "minmax-8bit" these in 8 bits;
"pages-of-4", "pages-of-16" and "pages-of-32" are the default with these, for contexts of few budgets or many,
"pages-of-32-8bit" in 8 bits, and "for-context" what QuestConfig.for_context gives, which makes the budget larger.

- ms: a step; tokens/s: batch over it.
- attention: the share of ms that a step without attention does not need; weights: that of its matrix products, logits
  included, timed alone; other: what remains, norms, RoPE and the like.
- ratio: ms with FlashInfer (SDPA where FlashInfer is not installed or not there) over ms.
"""

import argparse
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import chain, product
from pathlib import Path

import figures
import record
import torch
from decoders import SHAPES, ContiguousAttention, FilledPool, NoAttention, PagedAttention, random_decoder
from peers import check_close, flashinfer_module, note
from timing import graph_us, release_memory, steps_us

from quest_ops import QuestConfig
from quest_ops.config import NARROW_METADATA
from quest_ops.llama.compile_options import compile_options
from quest_ops.llama.model import Llama, default_dtype
from quest_ops.llama.quantized import WEIGHTS as ROUNDED_WEIGHTS
from quest_ops.llama.quantized import Int8Linear

WEIGHTS = ("fp32", *ROUNDED_WEIGHTS)
POLICIES = {
    "default": {},
    "minmax": {"page_size": 16, "bound": "minmax", "metadata_dtype": None},
    "minmax-8bit": {"page_size": 16, "bound": "minmax", "metadata_dtype": torch.float8_e4m3fn},
    **{f"pages-of-{size}": {"page_size": size} for size in (4, 16, 32)},
    "pages-of-32-8bit": {"page_size": 32, "metadata_dtype": torch.float8_e4m3fn},
}
FOR_CONTEXT = "for-context"
BITS = {dtype: str(bits) for bits, dtype in NARROW_METADATA.items()}  # of metadata not in the cache's dtype
ATTENTIONS = tuple(figures.ATTENTIONS)
CONTEXTS = tuple(1024 * k for k in (8, 16, 32, 64, 128))
QUICK_CONTEXTS = tuple(1024 * k for k in (2, 4, 8))
CPU_TURNS, CPU_PASSES = 5, 8
CHECK_BATCH, CHECK_CONTEXT = 2, 1000  # no multiple of a page
TOLERANCE = {torch.bfloat16: 0.02, torch.float32: 1e-5}  # of an output, as peers.check_close takes it
SHARES = "attention", "weights", "other"
HEADER = (
    f"{'case':24}{'weights':>8}  {'attention':52}{'budget':>8}{'ms':>9}{'tokens/s':>10}"
    f"{''.join(f'{share:>11}' for share in SHARES)}{'ratio':>8}"
)


def greedy_step(model: Llama, attention, batch: int, context: int, compiled: bool = False) -> torch.Tensor:
    """The tokens [B] after the last ones of `context`."""
    tokens = torch.arange(1, batch + 1, device=model.device)
    return model(tokens, torch.full_like(tokens, context - 1), attention, compiled=compiled).argmax(-1)


def step_ms(attention, step: Callable[[], object], device: str) -> float:
    cycle = attention.cycle
    if device == "cuda":
        times = []
        for left in range(cycle - 1, -1, -1)[:2]:  # one that chooses pages; all others are alike
            attention.plan(left)
            times.append(graph_us([step]) / 1e3)
        return (times[0] + (cycle - 1) * times[-1]) / cycle

    def planned_step(left: int) -> None:
        attention.plan(left)
        step()

    return steps_us([partial(planned_step, left) for left in reversed(range(cycle))], CPU_PASSES) / 1e3


def products(model: Llama, batch: int, compiled: bool) -> Callable[[], object]:
    """All matrix products of a step, one after the other on the same inputs."""
    layers = [m for m in model.modules() if hasattr(m, "in_features")]
    inputs = {
        size: torch.randn(batch, size, device=model.device).to(model.dtype) for size in {m.in_features for m in layers}
    }
    multiply = torch.nn.Module.__call__
    if compiled and any(isinstance(layer, (torch.nn.Linear, Int8Linear)) for layer in layers):
        options = compile_options(type(model.blocks[0].mlp.down))
        multiply = torch.compile(multiply, options=options)  # their kernels for few rows come from there
    return lambda: [multiply(layer, inputs[layer.in_features]) for layer in layers]


class Compared:
    """Runs SDPA and, on the same input, the others; raises RuntimeError where one of these is too far from it.

    Layer by layer: a whole model amplifies rounding to other tokens when its past is random.
    """

    def __init__(self, sdpa: ContiguousAttention, others: dict[str, PagedAttention]):
        self.sdpa, self.others = sdpa, others

    def plan(self, left: int = 0) -> None:
        for other in self.others.values():
            other.plan()

    def run(self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        expected = self.sdpa.run(layer, query, key, value)
        for name, other in self.others.items():
            out = other.run(layer, query, key, value)
            check_close(f"{name} attention, layer {layer}", out, expected, TOLERANCE[query.dtype])
        return expected


# What is timed: an attention's name, and for Quest its setting.
Entry = tuple[str, QuestConfig]


def entries_of(attentions: list[str], quests: list[QuestConfig]) -> list[Entry]:
    others = [(name, quests[0]) for name in attentions if name != "quest"]
    return [("quest", quest) for quest in quests if "quest" in attentions] + others


def pool_kind(quest: QuestConfig) -> tuple:
    """What a pool is made by: attentions of equal kinds can take turns on one."""
    return quest.page_size, quest.metadata_dtype, quest.bound, quest.bound_scale


def paged_attentions(model: Llama, batch: int, context: int, entries: list[Entry]) -> dict[Entry, PagedAttention]:
    """All on one pool for each kind."""
    pools, made = {}, {}
    for name, quest in entries:
        kind = pool_kind(quest)
        if kind not in pools:
            pools[kind] = FilledPool(model, batch, context, quest)
        made[name, quest] = PagedAttention(pools[kind], name, quest)
    return made


def quests_of(args: argparse.Namespace, context: int) -> list[QuestConfig]:
    """What is timed at a context. Raises ValueError as QuestConfig does."""
    makers = {name: partial(QuestConfig, **settings) for name, settings in POLICIES.items()}
    makers[FOR_CONTEXT] = partial(QuestConfig.for_context, context)
    return [
        makers[policy](
            token_budget=args.budget or (512 if args.quick else 2048),
            dense_layers=tuple(range(dense_layers)),
            select_every=every,
        )
        for policy, dense_layers, every in product(args.policy, args.dense_layers, args.select_every)
    ]


def check(model: Llama, entries: list[Entry]) -> None:
    """Raises RuntimeError unless all attentions agree in every layer of a step whose context Quest's budget covers."""
    size = CHECK_BATCH, CHECK_CONTEXT
    covering = dict.fromkeys((name, replace(q, token_budget=2 * CHECK_CONTEXT, dense_below=0)) for name, q in entries)
    others = paged_attentions(model, *size, [entry for entry in covering if entry[0] != "sdpa"])
    compared = Compared(ContiguousAttention(model, *size), {label(*entry): a for entry, a in others.items()})
    compared.plan()
    greedy_step(model, compared, *size)


def times_of(model: Llama, batch: int, context: int, entries: list[Entry], compiled: bool) -> dict[Entry | str, float]:
    """Milliseconds of a step with each attention that fits in memory, of one "without", and of its "products" alone."""
    device = model.device.type

    def measure(entries: list[Entry], alone: bool) -> dict:
        made = {"without": NoAttention()} if alone else {}
        made |= paged_attentions(model, batch, context, [entry for entry in entries if entry[0] != "sdpa"])
        made |= {entry: ContiguousAttention(model, batch, context) for entry in entries if entry[0] == "sdpa"}
        steps = {
            key: (attention, lambda attention=attention: greedy_step(model, attention, batch, context, compiled))
            for key, attention in made.items()
        }
        if alone:
            steps["products"] = NoAttention(), products(model, batch, compiled)
        # On the CPU they take turns, so that other load meets them all.
        turns = [
            {key: step_ms(*step, device) for key, step in steps.items()}
            for _ in range(CPU_TURNS if device == "cpu" else 1)
        ]
        return {key: min(turn[key] for turn in turns) for key in steps}

    if device == "cpu":
        return measure(entries, alone=True)
    times = measure([], alone=True)
    groups = defaultdict(list)  # one cache at a time, for the longest context that fits
    for name, quest in entries:
        groups["sdpa" if name == "sdpa" else pool_kind(quest)].append((name, quest))
    for group in groups.values():
        try:
            times |= measure(group, alone=False)
        except torch.OutOfMemoryError:
            names = ", ".join(label(*entry) for entry in group)
            note(f"batch {batch}, context {context}: not enough memory for {names}")
        release_memory()
    return times


def label(attention: str, quest: QuestConfig) -> str:
    return figures.label(
        attention, BITS.get(quest.metadata_dtype, ""), len(quest.dense_layers), quest.select_every, quest.page_size
    )


def rows_of(model_name: str, weights: str, batch: int, context: int, times: dict) -> list[dict]:
    times = dict(times)
    without, alone = times.pop("without"), times.pop("products")
    by_name = {name: ms for (name, _), ms in times.items()}
    peer = next((name for name in ("flashinfer", "sdpa") if name in by_name), None)
    return [
        {
            "case": f"{model_name}-{context / 1024:.3g}k-b{batch}", "model": model_name, "context": context,
            "batch": batch, "weights": weights, "budget": quest.token_budget, "dense_layers": len(quest.dense_layers),
            "select_every": quest.select_every, "page_size": quest.page_size, "bound": quest.bound,
            "metadata": BITS.get(quest.metadata_dtype, "32" if weights == "fp32" else "16"), "attention": name,
            "ms": ms, "without_attention_ms": without, "products_ms": alone, "tokens_per_s": batch * 1e3 / ms,
            "attention_share": 1 - without / ms, "weights_share": alone / ms, "other_share": (without - alone) / ms,
            "peer": peer, "ratio": by_name[peer] / ms if peer else None,
        }
        for (name, quest), ms in times.items()
    ]  # fmt: skip


def show(row: dict) -> None:
    ratio = "-" if row["ratio"] is None else f"{row['ratio']:.2f}"
    name, budget = figures.label_of(row), row["budget"] if row["attention"] == "quest" else "-"
    shares = "".join(f"{row[share + '_share']:11.0%}" for share in SHARES)
    times = f"{row['ms']:9.2f}{row['tokens_per_s']:10.1f}{shares}{ratio:>8}"
    print(f"{row['case']:24}{row['weights']:>8}  {name:52}{budget:>8}{times}", flush=True)


def load(name: str, weights: str, device: str) -> Llama:
    dtype, weights = (torch.float32, None) if weights == "fp32" else (torch.bfloat16, weights)
    if name in SHAPES:
        return random_decoder(SHAPES[name], dtype, device, weights)
    return Llama.load(name, dtype=dtype, weights=weights, device=device)[0]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="SmolLM2 on the CPU with a budget of 512, within a minute")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--model", nargs="+", choices=[*SHAPES, "smollm2"], help=f"default: {' '.join(SHAPES)}")
    which.add_argument("--checkpoint", help="a Hugging Face folder or hub id, or a .gguf file")
    parser.add_argument("--context", nargs="+", type=record.positive, metavar="TOKENS", help="default: 8K to 128K")
    parser.add_argument("--batch", nargs="+", type=record.positive, default=[1], metavar="SEQUENCES")
    parser.add_argument("--weights", choices=WEIGHTS, help="default: bf16; on a CPU without AVX2 fp32")
    parser.add_argument("--attention", nargs="+", choices=ATTENTIONS, help="default: all that run here")
    parser.add_argument("--budget", type=record.positive, metavar="TOKENS", help="of Quest; default: 2048")
    parser.add_argument(
        "--policy",
        nargs="+",
        choices=[*POLICIES, FOR_CONTEXT],
        default=["default"],
        help="Quest's pages and what it keeps of them",
    )
    parser.add_argument(
        "--dense-layers", nargs="+", type=record.natural, default=[0], metavar="N", help="first layers without Quest"
    )
    parser.add_argument(
        "--select-every", nargs="+", type=record.positive, default=[1], metavar="N", help="steps of a choice of pages"
    )
    parser.add_argument("--no-compile", action="store_true", help="small operations as torch runs them, on a GPU too")
    record.add_arguments(parser)
    args = parser.parse_args()

    args.device = "cpu" if args.quick else "cuda"
    if not args.quick and not torch.cuda.is_available():
        parser.error("needs a CUDA device; --quick times SmolLM2 on the CPU")
    if args.quick and "flashinfer" in (args.attention or ()):
        parser.error("--attention flashinfer needs a CUDA device")
    if not args.quick and args.weights == "fp32":
        parser.error("--weights fp32 goes with --quick: on a GPU the ops take bfloat16")
    if not args.attention:
        there = args.device == "cuda" and flashinfer_module() is not None
        args.attention = [name for name in ATTENTIONS if there or name != "flashinfer"]
    args.models = [args.checkpoint] if args.checkpoint else args.model or (["smollm2"] if args.quick else [*SHAPES])
    args.context = args.context or (QUICK_CONTEXTS if args.quick else CONTEXTS)
    args.weights = args.weights or ("bf16" if default_dtype(args.device) == torch.bfloat16 else "fp32")
    args.compiled = args.device == "cuda" and not args.no_compile
    try:
        args.quests = {context: quests_of(args, context) for context in args.context}
    except ValueError as error:
        parser.error(str(error))
    quests = [quest for quests in args.quests.values() for quest in quests]
    if uneven := [quest for quest in quests if quest.page_size % quest.select_every]:
        page_size, every = uneven[0].page_size, uneven[0].select_every
        parser.error(f"--select-every must divide a page of {page_size} tokens, got {every}")
    if uneven := [n for n in args.context if n % max(args.select_every)]:
        parser.error(f"--context must be a multiple of --select-every, got {uneven[0]}")
    return args


@torch.inference_mode()
def main() -> None:
    args = parse()
    rows, linear = [], []
    entries = {context: entries_of(args.attention, quests) for context, quests in args.quests.items()}
    print(HEADER)
    for name in args.models:
        model = load(name, args.weights, args.device)
        linear.append(type(model.blocks[0].mlp.down).__name__)  # whose products: torch's or humming's
        longest = model.config.max_position_embeddings
        if max(args.context) > longest:
            raise SystemExit(f"--context {max(args.context)} is more than the {longest} positions of {name}")
        check(model, list(chain.from_iterable(entries.values())))
        for batch in args.batch:
            torch.compiler.reset()  # else the second batch size is compiled for any, and a ninth shape not at all
            for context in args.context:
                times = times_of(model, batch, context, entries[context], args.compiled)
                new = rows_of(Path(name).name, args.weights, batch, context, times)
                for row in new:
                    show(row)
                rows += new
        del model
    contents = {
        "what": "milliseconds a decode step",
        "threads": torch.get_num_threads(),
        "compiled": args.compiled,
        "linear": linear,
        "rows": rows,
    }
    record.finish(args, args.device, contents)


if __name__ == "__main__":
    main()
