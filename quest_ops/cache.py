"""PagedKVCache: the KV pools and page metadata of all layers, and who owns which block of them."""

from __future__ import annotations

from array import array
from collections import Counter

import torch

from quest_ops.config import NARROW_METADATA, PAGE_SIZES, check_int, metadata_shape

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
HEAD_DIMS = (64, 128, 256)
MAX_PAGES_PER_BLOCK = 8


class OutOfPagesError(RuntimeError):
    """The pool has fewer free blocks than an operation needs. Nothing was changed."""


class Sequence:
    """State of one sequence, for reading: `blocks`, `length` in tokens, `epoch`, which moves whenever an entry of
    `blocks` is set, so that whoever keeps a copy (a block table) knows when it is stale, and `rollbacks`, how often
    tokens were taken away."""

    __slots__ = ("blocks", "epoch", "length", "rollbacks")

    def __init__(self) -> None:
        self.blocks = array("i")  # 4-byte ints: torch reads them in place
        self.length = 0
        self.epoch = 0
        self.rollbacks = 0


class PagedKVCache:
    """KV cache of all layers in fixed blocks of `page_size * pages_per_block` tokens, shared by many sequences.

    num_layers, num_kv_heads, head_dim: the model's; head_dim 64, 128 or 256.
    num_blocks: rows of the pool. A sequence of n tokens holds ceil(n / block_size) of them; forks share full blocks.
    page_size: tokens a page, what Quest selects: 4, 8, 16, 32, 64 or 128. pages_per_block: 1 to 8.
    dtype: bfloat16, float16, or, on a CPU, float32.
    metadata_dtype: float8_e4m3fn, saturating at +-448, uint8, 4 bits a number and a scale for 32 of them, saturating at
        +-458528, or dtype; None: dtype.
    max_sequence_tokens: longest sequence allowed; None: what the pool holds.

    By default its pages and metadata are those of QuestConfig's defaults, in blocks of 16 tokens: chosen by the table
    of policies in docs/accuracy.md, "Loss, and answers found" (pages of 8, 4-bit).

    In memory K and V are one tensor `pool [num_layers, num_blocks, 2, Hkv, S, D]` (HND), the metadata another,
    [num_layers, num_blocks, Hkv, M, 2, D], or in uint8 [num_layers, num_blocks, Hkv, M, 9 * D / 8]. The operations
    below move whole blocks and keep count; tokens are written by `append_paged_kv` at the places that `slots` names.
    Each of them checks first: when it raises, nothing has changed. Copies run on the current stream of the device;
    nothing here waits for the device.

    After `rollback` the metadata of the page in which the sequence now ends is still that of the tokens that were cut
    off, too (the page may be shared, and a last page is attended whatever its score). The next append to that page
    recomputes it.
    """

    def __init__(
        self,
        num_layers: int,
        num_kv_heads: int,
        head_dim: int,
        num_blocks: int,
        *,
        page_size: int = 8,
        pages_per_block: int = 2,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str = "cpu",
        metadata_dtype: torch.dtype | None = torch.uint8,
        max_sequence_tokens: int | None = None,
    ) -> None:
        self.num_layers = check_int("num_layers", num_layers, 1)
        self.num_kv_heads = check_int("num_kv_heads", num_kv_heads, 1)
        self.head_dim = check_int("head_dim", head_dim, 1)
        self.num_blocks = check_int("num_blocks", num_blocks, 1)
        self.page_size = check_int("page_size", page_size, 1)
        self.pages_per_block = check_int("pages_per_block", pages_per_block, 1)
        if head_dim not in HEAD_DIMS:
            raise ValueError(f"head_dim must be one of {HEAD_DIMS}, got {head_dim}")
        if page_size not in PAGE_SIZES:
            raise ValueError(f"page_size must be one of {PAGE_SIZES}, got {page_size}")
        if pages_per_block > MAX_PAGES_PER_BLOCK:
            raise ValueError(f"pages_per_block must be 1 to {MAX_PAGES_PER_BLOCK}, got {pages_per_block}")
        if num_blocks >= 2**31:
            raise ValueError(f"num_blocks must fit int32, got {num_blocks}")
        self.device = torch.device(device)
        if self.device.type not in ("cpu", "cuda"):
            raise ValueError(f"device must be a CPU or CUDA device, got {device!r}")
        if dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {DTYPES}, got {dtype!r}")
        if dtype == torch.float32 and self.device.type != "cpu":
            raise ValueError(f"dtype float32 is supported on a CPU only, got device {device!r}")
        if metadata_dtype not in (None, dtype, *NARROW_METADATA.values()):
            raise ValueError(
                f"metadata_dtype must be None, the cache's dtype {dtype}, torch.float8_e4m3fn or torch.uint8 (4 bits a "
                f"number), got {metadata_dtype!r}"
            )
        if self.device.type == "cuda" and not torch.cuda.is_available():
            raise RuntimeError(f"device {device!r} was asked for, but torch {torch.__version__} sees no CUDA GPU")
        self.dtype = dtype
        self.metadata_dtype = dtype if metadata_dtype is None else metadata_dtype
        self.block_size = page_size * pages_per_block
        if max_sequence_tokens is not None:
            check_int("max_sequence_tokens", max_sequence_tokens, 1)
        self.max_sequence_tokens = max_sequence_tokens

        self.pool = torch.empty(
            num_layers, num_blocks, 2, num_kv_heads, self.block_size, head_dim, dtype=dtype, device=self.device
        )
        self.device = self.pool.device  # "cuda" has become "cuda:0"
        self._metadata = torch.empty(
            (num_layers, num_blocks, num_kv_heads, pages_per_block, *metadata_shape(self.metadata_dtype, head_dim)),
            dtype=self.metadata_dtype,
            device=self.device,
        )
        # Views are made once: a layer of a decode step has no time for them.
        self._layers = [(kv[:, 0].transpose(1, 2), kv[:, 1].transpose(1, 2)) for kv in self.pool]
        self._page_metadata = list(self._metadata)

        self._sequences: dict[int, Sequence] = {}
        self._next_id = 0
        self._references = array("i", bytes(4 * num_blocks))  # by block: how many sequences hold it
        self._free = array("i", range(num_blocks - 1, -1, -1))  # a stack: blocks come out in ascending order

    def k_cache(self, layer: int) -> torch.Tensor:
        """Keys of a layer: a view [num_blocks, S, Hkv, D] of the pool."""
        return self._layers[layer][0]

    def v_cache(self, layer: int) -> torch.Tensor:
        """Values of a layer: a view [num_blocks, S, Hkv, D] of the pool."""
        return self._layers[layer][1]

    def page_metadata(self, layer: int) -> torch.Tensor:
        """Page metadata of a layer: a view [num_blocks, Hkv, M, 2, D], the two vectors of each page; in uint8
        [num_blocks, Hkv, M, 9 * D / 8]."""
        return self._page_metadata[layer]

    @property
    def free_blocks(self) -> int:
        """Blocks that no sequence holds."""
        return len(self._free)

    @property
    def kv_bytes(self) -> int:
        """Size of the K and V pools of all layers, in bytes."""
        return self.pool.numel() * self.pool.element_size()

    @property
    def metadata_bytes(self) -> int:
        """Size of the page metadata of all layers, in bytes."""
        return self._metadata.numel() * self._metadata.element_size()

    def add(self) -> int:
        """A new, empty sequence. Returns its id; ids are never used again."""
        seq = self._next_id
        self._next_id += 1
        self._sequences[seq] = Sequence()
        return seq

    def sequence(self, seq: int) -> Sequence:
        """The state of a sequence. Raises ValueError for an id that was never given out, or freed."""
        try:
            return self._sequences[seq]
        except (KeyError, TypeError):
            raise ValueError(f"sequence {seq!r} is not in this cache: never added, or freed") from None

    def length(self, seq: int) -> int:
        """Tokens of a sequence, in int: those reserved by `extend` and not rolled back."""
        return self.sequence(seq).length

    def block_ids(self, seq: int) -> list[int]:
        """The blocks of a sequence, in the order of its tokens."""
        return self.sequence(seq).blocks.tolist()

    def slots(self, seq: int, start: int, end: int) -> torch.Tensor:
        """Where the tokens [start, end) of a sequence lie: `block * S + offset`, int64 [end - start], on the CPU."""
        sequence = self.sequence(seq)
        check_int("start", start, 0)
        check_int("end", end, start)
        if end > sequence.length:
            raise ValueError(f"end {end} is past the length of sequence {seq}: {sequence.length}")
        if start == end:
            return torch.empty(0, dtype=torch.int64)
        positions = torch.arange(start, end)
        blocks = torch.frombuffer(sequence.blocks, dtype=torch.int32)
        return blocks[positions // self.block_size].long() * self.block_size + positions % self.block_size

    def extend(self, seq: int, n: int) -> None:
        """Reserves room for `n` more tokens. Copies the last block first where another sequence shares it.

        Raises OutOfPagesError when the pool has too few free blocks.
        """
        self.extend_all([seq], [n])

    def extend_all(self, seqs: list[int], counts: list[int]) -> None:
        """`extend` for several different sequences at once: for all of them or, when it raises, for none."""
        sequences = [self.sequence(seq) for seq in seqs]
        if len(counts) != len(seqs) or len(set(seqs)) != len(seqs):
            raise ValueError(f"extend_all takes different sequences and a count for each, got {seqs} and {counts}")
        given_up: Counter[int] = Counter()  # references that the copies of this call drop
        copies, added = [], []
        for seq, sequence, n in zip(seqs, sequences, counts, strict=True):
            length = sequence.length + check_int("n", n, 0)
            if self.max_sequence_tokens is not None and length > self.max_sequence_tokens:
                raise ValueError(
                    f"sequence {seq} would hold {length} tokens ({sequence.length} + {n}); "
                    f"this cache allows {self.max_sequence_tokens}"
                )
            added.append(-(-length // self.block_size) - len(sequence.blocks))
            copy = False
            if n > 0 and sequence.length % self.block_size:
                last = sequence.blocks[-1]
                copy = self._references[last] - given_up[last] > 1
                given_up[last] += copy
            copies.append(copy)
        self._check_free(sum(added) + sum(copies))

        for sequence, n, copy, blocks in zip(sequences, counts, copies, added, strict=True):
            if copy:
                shared = sequence.blocks[-1]
                sequence.blocks[-1] = self._copy_block(shared)
                self._references[shared] -= 1
            sequence.blocks.extend(self._take(blocks))
            sequence.length += n
            sequence.epoch += copy or blocks > 0

    def rollback(self, seq: int, n: int) -> None:
        """Forgets the last `n` tokens, and gives back the blocks that held nothing else."""
        sequence = self.sequence(seq)
        if check_int("n", n, 0) > sequence.length:
            raise ValueError(f"cannot roll sequence {seq} back by {n} tokens: it has {sequence.length}")
        sequence.length -= n
        sequence.rollbacks += n > 0
        self._drop(sequence, keep=-(-sequence.length // self.block_size))

    def fork(self, seq: int) -> int:
        """A new sequence with the same tokens. Full blocks are shared, a last partial block is copied. Returns its id.

        Raises OutOfPagesError when there is no free block for the copy.
        """
        parent = self.sequence(seq)
        partial = parent.length % self.block_size > 0
        self._check_free(int(partial))
        child = self.add()
        sequence = self._sequences[child]
        sequence.length = parent.length
        sequence.blocks = parent.blocks[:]
        for block in parent.blocks[: len(parent.blocks) - partial]:
            self._references[block] += 1
        if partial:
            sequence.blocks[-1] = self._copy_block(parent.blocks[-1])
        return child

    def free(self, seq: int) -> None:
        """Ends a sequence and gives back the blocks that no other shares."""
        self._drop(self.sequence(seq), keep=0)
        del self._sequences[seq]

    def _check_free(self, needed: int) -> None:
        if needed > len(self._free):
            raise OutOfPagesError(
                f"{needed} blocks of {self.block_size} tokens are needed, "
                f"{len(self._free)} of {self.num_blocks} are free"
            )

    def _take(self, count: int) -> array:
        """`count` free blocks, each now held once."""
        start = len(self._free) - count
        blocks = self._free[start:]
        del self._free[start:]
        blocks.reverse()
        for block in blocks:
            self._references[block] = 1
        return blocks

    def _copy_block(self, source: int) -> int:
        """A free block filled with K, V and metadata of `source`, in all layers."""
        (block,) = self._take(1)
        self.pool[:, block].copy_(self.pool[:, source])
        self._metadata[:, block].copy_(self._metadata[:, source])
        return block

    def _drop(self, sequence: Sequence, keep: int) -> None:
        """Lets go of all blocks of a sequence but the first `keep`."""
        for block in reversed(sequence.blocks[keep:]):
            self._references[block] -= 1
            if self._references[block] == 0:
                self._free.append(block)
        del sequence.blocks[keep:]
