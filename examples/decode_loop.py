"""Quest in someone's own inference loop; random q, k, v stand in for a model's layers. Runs on a GPU or a CPU."""

import time

import torch

from quest_ops import PagedKVCache, QuestAttention, QuestConfig

device = "cuda" if torch.cuda.is_available() else "cpu"
layers, query_heads, kv_heads, head_dim, prompt, steps = 4, 9, 3, 64, 4096, 16
cache = PagedKVCache(layers, kv_heads, head_dim, num_blocks=260, dtype=torch.bfloat16, device=device)
config = QuestConfig(token_budget=256)
sizes = {"max_batch_size": 1, "max_sequence_tokens": prompt + steps}


def forward(attention, tokens):
    for layer in range(layers):
        qkv = torch.randn(tokens, query_heads + 2 * kv_heads, head_dim, dtype=cache.dtype, device=device)
        out = attention.run(layer, *qkv.split([query_heads, kv_heads, kv_heads], dim=1))
    return out[-1].argmax().item()


document = cache.add()
reader = QuestAttention(config, cache, query_heads, **sizes)
for _ in range(0, prompt, 512):  # prefill in chunks
    reader.plan([document], 512, prefill=True)
    forward(reader, 512)

for backend in ("dense", "quest"):
    attention = QuestAttention(config, cache, query_heads, backend=backend, **sizes)
    answer = cache.fork(document)  # shares the document's blocks
    start = time.perf_counter()
    for _ in range(steps):
        attention.plan([answer], 1)
        forward(attention, 1)
    print(f"{backend}: {(time.perf_counter() - start) / steps * 1e3:.2f} ms a token on {device}", end=", ")
    read = 1 if backend == "dense" else 1 / config.page_size + config.token_budget / cache.length(answer)
    print(f"reads {read:.0%} of the KV cache of {cache.length(answer)} tokens")
    cache.free(answer)
