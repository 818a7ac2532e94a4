"""Fidelity at contexts that a model cannot read: of its own queries and keys, put at the places of a long text.

    python benchmarks/long_fidelity.py --json benchmarks/results/long-fidelity-h200.json
    python benchmarks/long_fidelity.py --quick

The model reads documents of --document tokens, of accuracy.py's texts. One after the other, their keys turned to the
places that they take (stitched.py), they are a context of each document that it ends, whose last queries ask. What a
policy makes of it is beside exact attention's: the relative error of the output and the share of the true mass, as
fidelity.py defines them, with the standard error over documents. budget: the defaults'; attended, read: the tokens that
a policy may attend to, and these with its metadata, in tokens' K and V; "equal bytes": as many as the defaults read.
"""

import argparse
import itertools
import os
import time
from pathlib import Path

# Beside other work on the machine, threads that spin make a prefill on the CPU 10 times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import record
import torch
from attend import page_masses
from fidelity import summary
from longer import METHODS, longer_config
from policies import ALL, BLOCK_SIZE, Policy
from recorded import documents_of
from recordings import QUERY_STRIDE, Recording, recordings_of
from stitched import Stitch
from tables import HEADER, columns, note, settings_of, show_fidelity
from tasks import texts_of
from torch import Tensor

import quest_ops
from quest_ops.config import metadata_shape
from quest_ops.fidelity import compare
from quest_ops.llama.model import Llama

DTYPE = torch.bfloat16  # of keys, values and queries, whatever the model runs in
QUERIES = 32  # of a document
WHOLE_PAGES = 128  # contexts are multiples of it
DEFAULTS = {  # full, quick
    "context": ((8192, 32768, 131072), (1024,)),
    "budget": ((512, 1024, 2048), (256,)),
    "document": (7168, 512),
    "documents": (24, 2),
    "layers": (None, [9, 16]),
}


class Context:
    """A layer's keys and values [N, Hkv, D], and how queries [Q, Hq, D] attend to their first seq_lens [Q] tokens."""

    def __init__(self, layer: int, query: Tensor, keys: Tensor, values: Tensor, seq_lens: Tensor):
        self.layer, self.query, self.keys, self.values, self.seq_lens = layer, query, keys, values, seq_lens
        self.exact = self._attend(BLOCK_SIZE)

    def attend(self, policy: Policy, budget: int) -> tuple[Tensor, Tensor]:
        """As a policy does with so many tokens: out [Q, Hq, D] and lse [Q, Hq], as are those of `exact`."""
        config = policy.config(budget)
        if self.layer in config.dense_layers:
            return self.exact
        size, block, choice = config.page_size, config.block_size, (config.sink_pages, config.recent_pages)
        if policy.oracle:
            masses = page_masses(self.query, self.keys[None], self.seq_lens, size, self.query.size(-1) ** -0.5)
            pages = quest_ops.select_topk_pages(masses, self.seq_lens, size, config.page_budget, *choice)
            return self._attend(block, *pages, page_size=size)
        k_cache, v_cache, table = self._pools(block)
        dtype = config.metadata_dtype or k_cache.dtype
        shape = len(k_cache), k_cache.size(2), block // size, *metadata_shape(dtype, k_cache.size(3))
        metadata = torch.zeros(shape, dtype=dtype, device=k_cache.device)
        if not policy.recent_only:
            lengths = self.seq_lens.new_tensor([len(self.keys)])
            quest_ops.update_page_metadata(
                k_cache, metadata, table[:1], lengths, torch.zeros_like(lengths), bound=config.bound,
                bound_scale=config.bound_scale,
            )  # fmt: skip
        return quest_ops.quest_decode_attention(
            self.query, k_cache, v_cache, metadata, table, self.seq_lens, config.page_budget, *choice,
            config.head_reduction, bound=config.bound,
        )  # fmt: skip

    def _pools(self, block: int) -> tuple[Tensor, Tensor, Tensor]:
        """Keys and values in blocks of so many tokens, and the block table of the queries."""
        k_cache, v_cache = (x.unflatten(0, (-1, block)) for x in (self.keys, self.values))
        blocks = torch.arange(len(k_cache), dtype=torch.int32, device=self.keys.device)
        return k_cache, v_cache, blocks.repeat(len(self.query), 1)

    def _attend(self, block: int, *pages: Tensor, page_size: int | None = None) -> tuple[Tensor, Tensor]:
        return quest_ops.sparse_decode_attention(
            self.query, *self._pools(block), self.seq_lens, *pages, page_size=page_size
        )


def measure(args, model: Llama, kinds: list[str], recordings: list[list[Recording]], context: int) -> list[dict]:
    sizes = [len(document.keys) for document in recordings[0]]
    compared = [(policy, budget) for policy in args.policies for budget in args.budget]
    shape = 3, len(sizes), len(recordings), model.config.num_attention_heads
    sums = [torch.zeros(shape, dtype=torch.float64) for _ in compared]
    for last in range(len(sizes)):
        stitch = Stitch(model.config, args.rope, sizes, last, context, QUERIES, model.device)
        for i, (layer, documents) in enumerate(zip(args.layers, recordings)):
            of_layer = Context(layer, *stitch.of(documents), stitch.seq_lens)
            for (policy, budget), of_policy in zip(compared, sums):
                out, lse = of_layer.attend(policy, policy.budget_at(budget, context))
                of_policy[:, last, i] = compare(out, lse, *of_layer.exact).sum(1).cpu()
    rows = []
    print(f"{len(sizes)} contexts; by kind of text at the end: error")
    print(f"{HEADER}{'error':>12}{'+-':>8}{'mass':>8}{columns(dict.fromkeys(kinds))}")
    for (policy, budget), of_policy in zip(compared, sums):
        row = settings_of(policy, budget, context, policy.budget_at(budget, context))
        rows.append(row | summary(of_policy, QUERIES, kinds))
        show_fidelity(rows[-1])
    return rows


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two short documents on the CPU, in under a minute")
    parser.add_argument("--model", default="smollm2", help="a Hugging Face folder or hub id, or a .gguf file")
    record.add_text_argument(parser)
    parser.add_argument("--context", nargs="+", type=record.positive, metavar="TOKENS")
    parser.add_argument("--budget", nargs="+", type=record.positive, metavar="TOKENS")
    choices = {policy.name: policy for policy in ALL if policy.fixed}
    parser.add_argument("--policy", nargs="+", choices=choices, default=list(choices), metavar="NAME")
    parser.add_argument("--document", type=record.positive, metavar="TOKENS", help="of a document")
    parser.add_argument("--documents", type=record.positive, metavar="N", help="of all kinds of text together")
    parser.add_argument("--layers", nargs="+", type=record.natural, help="default: all; with --quick 9 and 16")
    parser.add_argument("--rope", choices=METHODS, default="ntk", help="for contexts beyond the model's positions")
    record.add_arguments(parser)
    args = parser.parse_args()

    args.device = "cpu" if args.quick else "cuda"
    if not args.quick and not torch.cuda.is_available():
        parser.error("needs a CUDA device; --quick runs two short documents on the CPU")
    for name, (full, quick) in DEFAULTS.items():
        if getattr(args, name) is None:
            setattr(args, name, quick if args.quick else full)
    args.policies = [policy for name, policy in choices.items() if name in args.policy]
    if args.document <= QUERY_STRIDE * QUERIES:
        parser.error(
            f"--document must be above {QUERY_STRIDE * QUERIES}, the last queries' tokens, got {args.document}"
        )
    for context in args.context:
        if context % WHOLE_PAGES or context < args.document:
            parser.error(f"--context must be a multiple of {WHOLE_PAGES} and at least --document, got {context}")
        shortest = context - QUERY_STRIDE * QUERIES
        for policy, budget in itertools.product(args.policies, args.budget):
            if policy.budget_at(budget, context) >= shortest:
                parser.error(f"--budget {budget} covers the {shortest} tokens of queries in a --context of {context}")
            try:
                policy.config(policy.budget_at(budget, context))
            except ValueError as error:
                parser.error(str(error))
    return args


@torch.inference_mode()
def main() -> None:
    args = parse()
    model, tokenizer = Llama.load(args.model, device=args.device)
    layers = model.config.num_hidden_layers
    args.layers = args.layers or list(range(layers))
    if max(args.layers) >= layers:
        raise SystemExit(f"--layers must be 0 to {layers - 1}, got {max(args.layers)}")
    positions = model.config.max_position_embeddings
    if args.document > positions:
        raise SystemExit(f"--document {args.document} is more than the model's {positions} positions")
    try:
        texts = texts_of(tokenizer, args.text)
        documents = documents_of(texts, tokenizer.encode(""), args.document, args.documents)
        if max(args.context) > positions:
            longer_config(model.config, args.rope, max(args.context) / positions)
    except ValueError as error:
        raise SystemExit(str(error)) from error
    kinds = [kind for kind, _ in zip(itertools.cycle(texts), documents)]
    started = time.perf_counter()
    recordings = recordings_of(model, documents, args.layers, QUERIES, DTYPE)
    note(f"{len(documents)} documents of {args.document} tokens: {time.perf_counter() - started:.0f} s")
    rows = [row for context in args.context for row in measure(args, model, kinds, recordings, context)]
    contents = {"what": "fidelity at long contexts", "model": Path(args.model).name, "dtype": str(model.dtype)}
    contents |= {"texts": {kind: len(tokens) for kind, tokens in texts.items()}, "document": args.document}
    contents |= {"rope": args.rope, "measured_layers": args.layers, "rows": rows}
    record.finish(args, args.device, contents)


if __name__ == "__main__":
    main()
