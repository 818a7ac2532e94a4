"""FlashInfer's paged decode attention on a PagedKVCache: dense, to compare with."""

from __future__ import annotations

import torch
from torch import Tensor

from quest_ops.cache import PagedKVCache

WORKSPACE_BYTES = 128 << 20  # FlashInfer's recommendation
TENSOR_CORE_GROUP = 4  # from this many query heads a KV head, its tensor-core kernel is the faster one


class FlashInferDecode:
    """FlashInfer's BatchDecodeWithPagedKVCacheWrapper in its CUDA graph mode, one for each number of rows.

    The cache's pool of a layer, [num_blocks, 2, Hkv, S, D], is FlashInfer's HND layout as it is; its page is our block.
    Raises ValueError when the cache is not on a GPU, ImportError when FlashInfer is not installed.
    """

    def __init__(self, cache: PagedKVCache, num_query_heads: int, max_sequence_tokens: int, sm_scale: float) -> None:
        if cache.device.type != "cuda":
            raise ValueError(f"backend 'flashinfer' needs a cache on a CUDA GPU, this one is on {cache.device}")
        try:
            import flashinfer
        except ImportError as error:
            raise ImportError("backend 'flashinfer' needs FlashInfer: pip install flashinfer-python") from error
        self._make_wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper
        self._cache = cache
        self._num_query_heads = num_query_heads
        self._max_blocks = -(-max_sequence_tokens // cache.block_size)
        self._sm_scale = sm_scale
        self._workspace = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=cache.device)
        self._wrappers = {}

    def plan(self, block_table: Tensor, lengths: list[int], rows_per_request: int) -> None:
        """block_table [max_batch_size, max_blocks] int32 on the GPU; lengths: of each request's last row, 0 if empty.

        A request's T rows become T requests of FlashInfer on the same blocks: it knows one query token a request.
        """
        size = self._cache.block_size
        starts, indices, last_lengths = [0], [], []
        for b, length in enumerate(lengths):
            for t in range(rows_per_request):
                seen = max(0, length - rows_per_request + 1 + t)
                blocks = -(-seen // size)
                starts.append(starts[-1] + blocks)
                indices.append(block_table[b, :blocks])
                last_lengths.append((seen - 1) % size + 1 if seen else 0)
        self._planned = self._wrapper(len(last_lengths))
        self._planned.plan(
            torch.tensor(starts, dtype=torch.int32),
            torch.cat(indices),
            torch.tensor(last_lengths, dtype=torch.int32),
            self._num_query_heads,
            self._cache.num_kv_heads,
            self._cache.head_dim,
            size,
            q_data_type=self._cache.dtype,
            kv_data_type=self._cache.dtype,
            sm_scale=self._sm_scale,
        )

    def run(self, layer: int, query: Tensor) -> Tensor:
        """query [R, Hq, D] -> [R, Hq, D], for the rows of the last plan."""
        return self._planned.run(query.contiguous(), self._cache.pool[layer])

    def _wrapper(self, rows: int):
        if rows not in self._wrappers:

            def buffer(size: int) -> Tensor:
                return torch.empty(size, dtype=torch.int32, device=self._cache.device)

            self._wrappers[rows] = self._make_wrapper(
                self._workspace,
                kv_layout="HND",
                use_cuda_graph=True,
                use_tensor_cores=self._num_query_heads // self._cache.num_kv_heads >= TENSOR_CORE_GROUP,
                paged_kv_indptr_buffer=buffer(rows + 1),
                paged_kv_indices_buffer=buffer(rows * self._max_blocks),
                paged_kv_last_page_len_buffer=buffer(rows),
            )
        return self._wrappers[rows]
