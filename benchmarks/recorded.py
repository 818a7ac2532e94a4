"""Speed and exactness of Quest on the queries, keys and values of a real model, beside random ones.

    python benchmarks/recorded.py --json benchmarks/results/recorded-h100.json
    python benchmarks/recorded.py --quick

SmolLM2 reads documents as long as the shortest --context, of accuracy.py's texts; its keys and values after RoPE, put
one document after the other, fill paged pools of longer contexts, and its queries at the documents' ends ask. Scores of
real pages are clustered and repeat, which random ones do not. A row is a case with one kind of pages and one budget:
- recorded, random: microseconds a layer of the op in one call, as in kernels.py, on recorded and on random numbers of
  the same shape, in turns, the faster turn of each; and recorded over random.
- the rest is about the recorded numbers; exactness.py defines it. error: the largest of an output against float64
  attention to the chosen pages, in units of what rounding to 16 bits may do; differing: outputs further from it than
  rounding explains. cut: choices in which pages score exactly alike on both sides of the cut. other: choices of other
  pages than the separate ops make; ties: of these, those that rounding explains.

The exit code is 1 where an output differs or a choice is another one and no tie.
"""

import argparse
import itertools
import os
import sys
import time

# Beside other work on the machine, threads that spin make a prefill on the CPU 10 times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import exactness
import record
import torch
from cases import DEFAULT_PAGES, Case, Layers, Pages
from recordings import QUERY_STRIDE, RecordedLayers, Recording, lengths_of, recordings_of
from tasks import pieces, texts_of
from timing import release_memory

from quest_ops.llama.model import Llama

PAGES = (Pages(16), DEFAULT_PAGES)
DTYPE = torch.bfloat16  # of the pools, whatever the model runs in
TURNS = {"cuda": 3, "cpu": 1}
DEFAULTS = {  # full, quick
    "context": ((7168, 32768, 131072), (2048, 8192)),
    "documents": (20, 1),  # more than the longest context holds
}
HEADER = (
    f"{'case':10}{'page':>5}{'bits':>5} {'bound':10}{'budget':>6}{'recorded':>10}{'random':>10}{'ratio':>7}"
    f"{'error':>7}{'differing':>16}{'cut':>6}{'other':>7}{'ties':>6}{'choices':>9}"
)


def documents_of(texts: dict[str, list[int]], start: list[int], tokens: int, count: int) -> list[list[int]]:
    """`count` documents of `tokens` tokens, of the kinds of text in turn. Raises ValueError where one is too short."""
    each = -(-count // len(texts))
    found = [body for _, body in pieces(texts, tokens - len(start), each)]
    in_turn = [found[kind * each + i] for i in range(each) for kind in range(len(texts))]
    return [start + body for body in in_turn[:count]]


def cases_of(args, shape) -> list[Case]:
    cases = []
    for context, batch, budget in itertools.product(args.context, args.batch, args.budget):
        lengths = lengths_of(context, batch)
        if budget >= min(lengths):
            print(f"# a budget of {budget} covers a context of {min(lengths)}: nothing to choose", file=sys.stderr)
            continue
        name = f"{context // 1024}k-b{batch}" if context % 1024 == 0 else f"{context}-b{batch}"
        heads = shape.num_key_value_heads, shape.num_attention_heads
        cases.append(Case(name, lengths, *heads, PAGES, budget=budget, dtype=DTYPE, head_dim=shape.head_dim))
    return cases


def measure(case: Case, device: str, recordings: list[list[Recording]]) -> list[dict]:
    both = {"recorded": RecordedLayers(case, device, recordings), "random": Layers(case, device)}
    rows = []
    for pages in case.pages:
        found = exactness.summary(both["recorded"], pages)
        us = dict.fromkeys(both, float("inf"))
        for _ in range(TURNS[device]):
            for data, layers in both.items():
                layers.metadata(pages)
                once = layers.us(lambda i, x=layers, p=pages: x.quest(i, p, workspace=x.workspace))
                us[data] = min(us[data], once)
        rows.append({
            "case": case.name, "context": case.context, "batch": case.batch, "layers": both["recorded"].count,
            "page_size": pages.size, "metadata": case.metadata_bits(pages), "bound": pages.bound,
            "budget": case.budget, "recorded_us": us["recorded"], "random_us": us["random"],
            "ratio": us["recorded"] / us["random"], **found,
        })  # fmt: skip
    return rows


def show(row: dict) -> None:
    where = f"{row['case']:10}{row['page_size']:5}{row['metadata']:>5} {row['bound']:10}{row['budget']:6}"
    times = f"{row['recorded_us']:10.2f}{row['random_us']:10.2f}{row['ratio']:7.2f}"
    differing = f"{row['differing']} of {row['outputs']}"
    choices = f"{row['equal_at_the_cut']:6}{row['other_choices']:7}{row['ties']:6}{row['choices']:9}"
    print(f"{where}{times}{row['error']:7.2f}{differing:>16}{choices}", flush=True)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one short document on the CPU, in under a minute")
    record.add_text_argument(parser)
    parser.add_argument("--layers", nargs="+", type=record.natural, default=[2, 9, 16, 23], help="that are recorded")
    parser.add_argument("--documents", type=record.positive, metavar="N", help="of all kinds of text together")
    parser.add_argument("--context", nargs="+", type=record.positive, metavar="TOKENS")
    parser.add_argument("--batch", nargs="+", type=record.positive, default=[1, 8])
    parser.add_argument("--budget", nargs="+", type=record.positive, default=[512, 2048], metavar="TOKENS")
    record.add_arguments(parser)
    args = parser.parse_args()

    args.device = "cpu" if args.quick else "cuda"
    if not args.quick and not torch.cuda.is_available():
        parser.error("needs a CUDA device; --quick runs one short document on the CPU")
    if args.figure:
        parser.error("--figure: there is none of these rows")
    for name, choices in DEFAULTS.items():
        if getattr(args, name) is None:
            setattr(args, name, choices[args.quick])
    least = max((pages.sink + pages.recent + 1) * pages.size for pages in PAGES)
    if min(args.budget) < least:
        parser.error(f"--budget must be at least {least}, got {min(args.budget)}")
    if QUERY_STRIDE * (max(args.batch) - 1) >= min(args.context):
        parser.error(f"--batch {max(args.batch)}: a document of {min(args.context)} tokens has fewer recorded queries")
    return args


@torch.inference_mode()
def main() -> None:
    args = parse()
    model, tokenizer = Llama.load("smollm2", device=args.device)
    shape, tokens = model.config, min(args.context)
    if tokens > shape.max_position_embeddings:
        raise SystemExit(f"--context {tokens} is more than the {shape.max_position_embeddings} positions of a document")
    if max(args.layers) >= shape.num_hidden_layers:
        raise SystemExit(f"--layers must be 0 to {shape.num_hidden_layers - 1}, got {max(args.layers)}")
    try:
        texts = texts_of(tokenizer, args.text)
        documents = documents_of(texts, tokenizer.encode(""), tokens, args.documents)
    except ValueError as error:
        raise SystemExit(str(error)) from error
    started = time.perf_counter()
    recordings = recordings_of(model, documents, args.layers, max(args.batch), DTYPE)
    taken = time.perf_counter() - started
    print(f"# layers {args.layers} of {len(documents)} documents of {tokens} tokens: {taken:.0f} s", file=sys.stderr)
    del model

    rows = []
    print(HEADER)
    for case in cases_of(args, shape):
        new = measure(case, args.device, recordings)
        for row in new:
            show(row)
        rows += new
        release_memory()
    contents = {"what": "microseconds a layer", "model": "smollm2", "recorded_layers": args.layers}
    contents |= {"documents": len(documents), "texts": {kind: len(found) for kind, found in texts.items()}}
    record.finish(args, args.device, contents | {"rows": rows})
    if wrong := [row for row in rows if not exactness.is_exact(row)]:
        raise SystemExit(f"not exact: {len(wrong)} of {len(rows)} rows")


if __name__ == "__main__":
    main()
