"""Quest in someone's own inference loop; random q, k, v stand in for a model's layers. Runs on a GPU or a CPU."""

import time

import torch

from quest_ops import PagedKVCache, QuestAttention, QuestConfig

layers, query_heads, kv_heads, head_dim, prompt, steps = 4, 9, 3, 64, 4096, 16
config = QuestConfig(token_budget=256, dense_below=256)  # by default also dense wherever that is faster
cache = PagedKVCache(layers, kv_heads, head_dim, num_blocks=260, device="cuda" if torch.cuda.is_available() else "cpu")
sizes = {"max_batch_size": 1, "max_sequence_tokens": prompt + steps}
attentions = {name: QuestAttention(config, cache, query_heads, backend=name, **sizes) for name in ("dense", "quest")}


def forward(attention, sequence, tokens):
    attention.plan([sequence], tokens)  # once a step; run once a layer
    for layer in range(layers):
        qkv = torch.randn(tokens, query_heads + 2 * kv_heads, head_dim, dtype=cache.dtype, device=cache.device)
        out = attention.run(layer, *qkv.split([query_heads, kv_heads, kv_heads], dim=1))
    return out[-1].argmax().item()


document = cache.add()
for _ in range(0, prompt, 512):  # prefill in chunks
    forward(attentions["quest"], document, 512)
for name, attention in attentions.items():
    answer = cache.fork(document)  # shares the document's blocks
    start = time.perf_counter()
    tokens = [forward(attention, answer, 1) for _ in range(steps)]
    ms = (time.perf_counter() - start) / len(tokens) * 1e3
    read = 1 if name == "dense" else cache.metadata_bytes / cache.kv_bytes + config.token_budget / cache.length(answer)
    print(f"{name}: {ms:.2f} ms a token on {cache.device.type}, reads {read:.0%} of the KV cache")
    cache.free(answer)
