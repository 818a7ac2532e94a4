"""Times one decode step of the reference decoder, from token to greedy token, with each kind of attention in turn.

    python benchmarks/end_to_end.py --json benchmarks/results/end_to_end-h100.json --figure end_to_end.png
    python benchmarks/end_to_end.py --quick --json benchmarks/results/end_to_end-cpu.json

Attention is Quest, this library's dense paged attention, FlashInfer's (on a GPU, where installed) or torch's SDPA on
contiguous keys and values; nothing else differs. Weights are random but for smollm2 and --checkpoint, keys and values
always. All attentions are first compared, layer by layer, on a context that Quest's budget covers. On a GPU the step is
one CUDA graph (median of 20 replays; planning, which the host does while the GPU works, is not in it); on the CPU it is
plain calls, planning included, and the fastest of 40.

- ms: a step; tokens/s: batch over it.
- attention: the share of ms that a step without attention does not need.
- ratio: ms with FlashInfer (SDPA where FlashInfer is not installed or not there) over ms.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import figures
import record
import torch
from decoders import SHAPES, ContiguousAttention, FilledPool, NoAttention, PagedAttention, random_decoder
from peers import check_close, flashinfer_module, note
from timing import graph_us, wall_us

from quest_ops import QuestConfig
from quest_ops.llama.model import Llama, default_dtype

WEIGHTS = {"bf16": torch.bfloat16, "fp32": torch.float32}
ATTENTIONS = tuple(figures.ATTENTIONS)
CONTEXTS = tuple(1024 * k for k in (8, 16, 32, 64, 128))
QUICK_CONTEXTS = tuple(1024 * k for k in (2, 4, 8))
CPU_TURNS, CPU_PASSES = 5, 8
CHECK_BATCH, CHECK_CONTEXT = 2, 1000  # no multiple of a page
TOLERANCE = {torch.bfloat16: 0.02, torch.float32: 1e-5}  # of an output, as peers.check_close takes it
HEADER = f"{'case':24}{'weights':>8}  {'attention':12}{'ms':>9}{'tokens/s':>10}{'attention':>11}{'ratio':>8}"


def greedy_step(model: Llama, attention, batch: int, context: int) -> torch.Tensor:
    """The tokens [B] after the last ones of `context`."""
    tokens = torch.arange(1, batch + 1, device=model.device)
    return model(tokens, torch.full_like(tokens, context - 1), attention).argmax(-1)


def step_ms(model: Llama, attention, batch: int, context: int) -> float:
    if model.device.type == "cuda":
        attention.plan()
        return graph_us([lambda: greedy_step(model, attention, batch, context)]) / 1e3

    def planned_step() -> None:
        attention.plan()
        greedy_step(model, attention, batch, context)

    return wall_us([planned_step], CPU_PASSES) / 1e3


def step_times(model: Llama, attentions: dict, batch: int, context: int) -> dict[str, float]:
    """Milliseconds of a step with each attention. On the CPU they take turns, so that other load meets them all."""
    turns = [
        {name: step_ms(model, attention, batch, context) for name, attention in attentions.items()}
        for _ in range(CPU_TURNS if model.device.type == "cpu" else 1)
    ]
    return {name: min(turn[name] for turn in turns) for name in attentions}


class Compared:
    """Runs SDPA and, on the same input, the others; raises RuntimeError where one of these is too far from it.

    Layer by layer: a whole model amplifies rounding to other tokens when its past is random.
    """

    def __init__(self, sdpa: ContiguousAttention, others: dict[str, PagedAttention]):
        self.sdpa, self.others = sdpa, others

    def plan(self) -> None:
        for other in self.others.values():
            other.plan()

    def run(self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        expected = self.sdpa.run(layer, query, key, value)
        for name, other in self.others.items():
            out = other.run(layer, query, key, value)
            check_close(f"{name} attention, layer {layer}", out, expected, TOLERANCE[query.dtype])
        return expected


def check(model: Llama, attentions: list[str], quest: QuestConfig) -> None:
    """Raises RuntimeError unless all attentions agree in every layer of a step whose context Quest's budget covers."""
    size = CHECK_BATCH, CHECK_CONTEXT
    pool = FilledPool(model, *size, replace(quest, token_budget=2 * CHECK_CONTEXT, dense_below=0))
    others = {name: PagedAttention(pool, name) for name in attentions if name != "sdpa"}
    compared = Compared(ContiguousAttention(model, *size), others)
    compared.plan()
    greedy_step(model, compared, *size)


def times_of(model: Llama, batch: int, context: int, attentions: list[str], quest: QuestConfig) -> dict[str, float]:
    """Milliseconds of a step with each attention that fits in memory, and with "none"."""

    def measure(names: list[str]) -> dict[str, float]:
        made, paged = {}, [name for name in names if name not in ("none", "sdpa")]
        if "none" in names:
            made["none"] = NoAttention()
        if paged:
            pool = FilledPool(model, batch, context, quest)
            made |= {name: PagedAttention(pool, name) for name in paged}
        if "sdpa" in names:
            made["sdpa"] = ContiguousAttention(model, batch, context)
        return step_times(model, made, batch, context)

    if model.device.type == "cpu":
        return measure(["none", *attentions])
    times = measure(["none"])
    # On a GPU one cache at a time, for the longest context that fits.
    for names in ([name for name in attentions if name != "sdpa"], [name for name in attentions if name == "sdpa"]):
        try:
            times |= measure(names)
        except torch.OutOfMemoryError:
            note(f"batch {batch}, context {context}: not enough memory for {', '.join(names)}")
        torch.cuda.empty_cache()
    return times


def rows_of(model_name: str, weights: str, batch: int, context: int, quest: QuestConfig, times: dict):
    times = dict(times)
    rest = times.pop("none")
    peer = next((name for name in ("flashinfer", "sdpa") if name in times), None)
    shared = {
        "case": f"{model_name}-{context / 1024:.3g}k-b{batch}", "model": model_name, "context": context, "batch": batch,
        "weights": weights, "budget": quest.token_budget, "dense_layers": len(quest.dense_layers),
        "metadata": "8" if quest.metadata_dtype else str(8 * WEIGHTS[weights].itemsize), "rest_ms": rest,
        "peer": peer,
    }  # fmt: skip
    return [
        shared
        | {
            "attention": name,
            "ms": ms,
            "tokens_per_s": batch * 1e3 / ms,
            "attention_share": 1 - rest / ms,
            "ratio": times[peer] / ms if peer else None,
        }
        for name, ms in times.items()
    ]


def show(row: dict) -> None:
    ratio = "-" if row["ratio"] is None else f"{row['ratio']:.2f}"
    times = f"{row['ms']:9.2f}{row['tokens_per_s']:10.1f}{row['attention_share']:11.0%}{ratio:>8}"
    print(f"{row['case']:24}{row['weights']:>8}  {row['attention']:12}{times}", flush=True)


def load(name: str, dtype: torch.dtype, device: str) -> Llama:
    if name in SHAPES:
        return random_decoder(SHAPES[name], dtype, device)
    return Llama.load(name, dtype=dtype, device=device)[0]


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more, got {text}")
    return number


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="SmolLM2 on the CPU with a budget of 512, within a minute")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--model", nargs="+", choices=[*SHAPES, "smollm2"], help=f"default: {' '.join(SHAPES)}")
    which.add_argument("--checkpoint", help="a Hugging Face folder or hub id, or a .gguf file")
    parser.add_argument("--context", nargs="+", type=positive, metavar="TOKENS", help="default: 8K to 128K")
    parser.add_argument("--batch", nargs="+", type=positive, default=[1], metavar="SEQUENCES")
    parser.add_argument("--weights", choices=WEIGHTS, help="default: bf16; on a CPU without its instructions fp32")
    parser.add_argument("--attention", nargs="+", choices=ATTENTIONS, help="default: all that run here")
    parser.add_argument("--budget", type=positive, metavar="TOKENS", help="of Quest; default: 2048")
    parser.add_argument("--dense-layers", type=positive, default=0, metavar="N", help="first layers without Quest")
    parser.add_argument("--eight-bit-metadata", action="store_true")
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
    dtype = WEIGHTS[args.weights] if args.weights else default_dtype(args.device)
    args.weights = next(name for name in WEIGHTS if WEIGHTS[name] == dtype)
    try:
        args.quest = QuestConfig(
            token_budget=args.budget or (512 if args.quick else 2048),
            dense_layers=tuple(range(args.dense_layers)),
            metadata_dtype=torch.float8_e4m3fn if args.eight_bit_metadata else None,
        )
    except ValueError as error:
        parser.error(str(error))
    return args


@torch.inference_mode()
def main() -> None:
    args = parse()
    rows = []
    print(HEADER)
    for name in args.models:
        model = load(name, WEIGHTS[args.weights], args.device)
        longest = model.config.max_position_embeddings
        if max(args.context) > longest:
            raise SystemExit(f"--context {max(args.context)} is more than the {longest} positions of {name}")
        check(model, args.attention, args.quest)
        for batch in args.batch:
            for context in args.context:
                times = times_of(model, batch, context, args.attention, args.quest)
                new = rows_of(Path(name).name, args.weights, batch, context, args.quest, times)
                for row in new:
                    show(row)
                rows += new
        del model
    contents = {"what": "milliseconds a decode step", "threads": torch.get_num_threads(), "rows": rows}
    record.finish(args, args.device, contents)


if __name__ == "__main__":
    main()
