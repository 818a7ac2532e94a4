"""Decode attention on the CPU: Quest and our dense paged attention beside torch's SDPA, for one token over a long text.

The shape is SmolLM2-135M's: 30 layers, 9 query heads, 3 KV heads, head dim 64. A call is one layer; layers rotate
and other memory is written between passes, so that caches are as cold as in a real decode step. Quest's output is
checked against SDPA over the pages it selected before anything is timed. GB/s counts the bytes that must move: for
Quest the metadata of all pages, K and V of the chosen ones. The speed-up is over the faster of SDPA's two forms.

    python benchmarks/cpu_decode.py --threads 2 --json cpu_decode.json
"""

import argparse
import json
import sys

import torch
import torch.nn.functional as F
from timing import wall_us

import quest_ops

NUM_LAYERS, NUM_Q_HEADS, NUM_KV_HEADS, HEAD_DIM = 30, 9, 3, 64
PAGE_SIZE, SINK_PAGES, RECENT_PAGES = 16, 1, 4
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Caches:
    """The same random keys and values of every layer, once paged in a shuffled order and once contiguous."""

    def __init__(self, tokens: int, dtype: torch.dtype):
        num_pages = -(-tokens // PAGE_SIZE)
        shape = (NUM_LAYERS, 1, NUM_KV_HEADS, tokens, HEAD_DIM)
        self.keys, self.values = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
        self.query = torch.randn(NUM_LAYERS, 1, NUM_Q_HEADS, HEAD_DIM).to(dtype)
        self.block_table = torch.randperm(num_pages).int()[None]
        self.seq_lens = torch.tensor([tokens], dtype=torch.int32)
        position = torch.arange(tokens)
        slots = self.block_table[0, position // PAGE_SIZE].long() * PAGE_SIZE + position % PAGE_SIZE
        pool = torch.zeros(NUM_LAYERS, num_pages, 2, NUM_KV_HEADS, PAGE_SIZE, HEAD_DIM, dtype=dtype)
        self.k_pool, self.v_pool = pool[:, :, 0].transpose(2, 3), pool[:, :, 1].transpose(2, 3)
        self.metadata = torch.zeros(NUM_LAYERS, num_pages, NUM_KV_HEADS, 1, 2, HEAD_DIM, dtype=dtype)
        for layer in range(NUM_LAYERS):
            key, value = self.keys[layer, 0].transpose(0, 1), self.values[layer, 0].transpose(0, 1)
            quest_ops.append_paged_kv(key, value, self.k_pool[layer], self.v_pool[layer], self.metadata[layer], slots)

    def dense(self, layer: int) -> torch.Tensor:
        pools = self.k_pool[layer], self.v_pool[layer]
        return quest_ops.sparse_decode_attention(self.query[layer], *pools, self.block_table, self.seq_lens)[0]

    def quest(self, layer: int, page_budget: int) -> torch.Tensor:
        return quest_ops.quest_decode_attention(
            self.query[layer], self.k_pool[layer], self.v_pool[layer], self.metadata[layer], self.block_table,
            self.seq_lens, page_budget, SINK_PAGES, RECENT_PAGES, "max",
        )[0]  # fmt: skip

    def estimate(self, layer: int) -> torch.Tensor:
        metadata = self.metadata[layer]
        return quest_ops.estimate_page_scores(
            self.query[layer], metadata, self.block_table, self.seq_lens, PAGE_SIZE, "max"
        )

    def select(self, scores: torch.Tensor, page_budget: int) -> tuple[torch.Tensor, torch.Tensor]:
        return quest_ops.select_topk_pages(scores, self.seq_lens, PAGE_SIZE, page_budget, SINK_PAGES, RECENT_PAGES)

    def attend(self, layer: int, page_ids: torch.Tensor, page_counts: torch.Tensor) -> torch.Tensor:
        pools = self.k_pool[layer], self.v_pool[layer]
        table = self.block_table, self.seq_lens
        return quest_ops.sparse_decode_attention(self.query[layer], *pools, *table, page_ids, page_counts)[0]

    def sdpa_gqa(self, layer: int) -> torch.Tensor:
        query = self.query[layer].transpose(0, 1)[None]
        keys, values = self.keys[layer], self.values[layer]
        return F.scaled_dot_product_attention(query, keys, values, enable_gqa=True).view(1, NUM_Q_HEADS, HEAD_DIM)

    def sdpa_group(self, layer: int, keep: torch.Tensor | None = None) -> torch.Tensor:
        """The heads of a group as the queries of one KV head: the same attention without a GQA path."""
        query = self.query[layer].view(1, NUM_KV_HEADS, -1, HEAD_DIM)
        out = F.scaled_dot_product_attention(query, self.keys[layer], self.values[layer], attn_mask=keep)
        return out.view(1, NUM_Q_HEADS, HEAD_DIM)


def check(caches: Caches, tokens: int, page_budget: int) -> None:
    """Raises AssertionError unless dense and Quest agree with SDPA, Quest over the pages it selected."""
    tolerance = 1e-4 if caches.query.dtype == torch.float32 else 2e-2
    page_ids, _ = caches.select(caches.estimate(0), page_budget)
    keep = torch.zeros(1, NUM_KV_HEADS, 1, tokens, dtype=torch.bool)
    for head in range(NUM_KV_HEADS):
        chosen = page_ids[0, head][page_ids[0, head] >= 0]
        keep[0, head, 0] = torch.isin(torch.arange(tokens) // PAGE_SIZE, chosen)
    for got, expected in (
        (caches.dense(0), caches.sdpa_group(0)),
        (caches.sdpa_gqa(0), caches.sdpa_group(0)),
        (caches.quest(0, page_budget), caches.sdpa_group(0, keep)),
    ):
        torch.testing.assert_close(got.float(), expected.float(), rtol=tolerance, atol=tolerance)


def measure(dtype: str, tokens: int, token_budget: int, repeats: int) -> dict:
    caches, page_budget = Caches(tokens, DTYPES[dtype]), token_budget // PAGE_SIZE
    check(caches, tokens, page_budget)
    scores = [caches.estimate(layer) for layer in range(NUM_LAYERS)]
    pages = [caches.select(s, page_budget) for s in scores]
    calls = {
        "SDPA enable_gqa": caches.sdpa_gqa,
        "SDPA by group": caches.sdpa_group,
        "dense paged": caches.dense,
        "quest": lambda layer: caches.quest(layer, page_budget),
        "  estimate": caches.estimate,
        "  select": lambda layer: caches.select(scores[layer], page_budget),
        "  attend": lambda layer: caches.attend(layer, *pages[layer]),
    }
    layers = range(NUM_LAYERS)
    times = {name: wall_us([lambda i=i, f=f: f(i) for i in layers], repeats) for name, f in calls.items()}
    vector_bytes = NUM_KV_HEADS * HEAD_DIM * DTYPES[dtype].itemsize
    kv, chosen = 2 * tokens * vector_bytes, 2 * min(token_budget, tokens) * vector_bytes
    metadata = 2 * -(-tokens // PAGE_SIZE) * vector_bytes
    moved = dict.fromkeys(("SDPA enable_gqa", "SDPA by group", "dense paged"), kv)
    moved |= {"quest": metadata + chosen, "  estimate": metadata, "  attend": chosen}
    best_sdpa = min(times["SDPA enable_gqa"], times["SDPA by group"])
    rows = []
    for name, us in times.items():
        gb_per_s = moved[name] / us / 1e3 if name in moved else None
        rows.append({"name": name, "us": us, "gb_per_s": gb_per_s, "speedup": best_sdpa / us})
    return {"dtype": dtype, "tokens": tokens, "token_budget": token_budget, "rows": rows}


def show(result: dict) -> None:
    print(f"\n{result['dtype']}, {result['tokens']} tokens, budget {result['token_budget']}")
    print(f"{'':18}{'us a layer':>12}{'GB/s':>8}{'x best SDPA':>13}")
    for row in result["rows"]:
        rate = "" if row["gb_per_s"] is None else f"{row['gb_per_s']:.1f}"
        print(f"{row['name']:18}{row['us']:12.1f}{rate:>8}{row['speedup']:13.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--token-budget", type=int, default=512)
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["fp32", "bf16"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--json", metavar="PATH")
    parser.add_argument("--csrc-tree", default="unknown", help="`git rev-parse HEAD:csrc` of the code that runs")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    results = []
    for dtype in args.dtypes:
        results.append(measure(dtype, args.tokens, args.token_budget, args.repeats))
        show(results[-1])
    if args.json:
        with open(args.json, "w") as file:
            machine = {"torch": torch.__version__, "cpu": torch.backends.cpu.get_cpu_capability()}
            run = {"command": "python " + " ".join(sys.argv), "csrc_tree": args.csrc_tree, "threads": args.threads}
            json.dump(machine | run | {"results": results}, file, indent=1)
            file.write("\n")


if __name__ == "__main__":
    main()
