"""Random inputs in the ops' tensors, and how their results are compared.

Whatever an op must not read holds NaN (keys, values, metadata) or a number that would crash (block tables), so every
test that compares with a twin is also a test that nothing else is read.
"""

import dataclasses

import torch
from hypothesis import strategies as st

from quest_ops import reference
from quest_ops.config import metadata_shape

BAD_INPUT = (RuntimeError, ValueError, TypeError)

LAYOUTS = ("NHD", "HND", "flashinfer", "vllm", "quest_ops")
GROUPS = (1, 2, 3, 4, 7, 8, 16)
PAGE_SIZES = (4, 8, 16, 32, 64, 128)
HEAD_DIMS = (64, 128, 256)
HEAD_REDUCTIONS = ("max", "mean", "none")
FP8 = torch.float8_e4m3fn
INT4 = torch.uint8  # 4 bits a number
METADATA_DTYPES = (None, FP8, INT4)  # None: the cache's
PRINCIPAL = "principal", 1.0  # bound and scale
BOUNDS = (
    ("minmax", 1.0), ("cuboid", 1.0), ("mean_std", 1.0), ("mean_std", 1.5), ("cuboid", 0.3), PRINCIPAL,
    ("principal", 0.6),
)  # fmt: skip
JUNK_BLOCKS = (2**30, -7, 2**31 - 1, -(2**31))

OUT_TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
LSE_TOLERANCE = 1e-3
# Sums of up to 512 products in float32, relative to the sum of their magnitudes.
SCORE_TOLERANCE = 3e-5


def dtypes(device):
    return (torch.float16, torch.bfloat16) if device == "cuda" else (torch.float32, torch.float16, torch.bfloat16)


@dataclasses.dataclass(frozen=True)
class Shape:
    """`lengths` are those of the requests; row t of T sees `length - T + 1 + t` tokens, as in speculative decoding."""

    lengths: tuple[int, ...] = (150, 33)
    max_blocks: int = 12
    page_size: int = 16
    pages_per_block: int = 1
    rows_per_request: int = 1
    kv_heads: int = 2
    group: int = 2
    head_dim: int = 64
    dtype: torch.dtype = torch.float16
    layout: str = "NHD"
    seed: int = 0
    metadata_dtype: torch.dtype | None = None
    bound: tuple[str, float] = BOUNDS[0]

    def __post_init__(self):
        assert max(self.lengths) <= self.max_blocks * self.block_size, "a request is longer than its block table"

    @property
    def bound_options(self):
        return {"bound": self.bound[0], "bound_scale": self.bound[1]}

    @property
    def block_size(self):
        return self.page_size * self.pages_per_block

    @property
    def num_blocks(self):
        return len(self.lengths) * self.max_blocks + 3

    @property
    def num_heads(self):
        return self.kv_heads * self.group

    @property
    def num_rows(self):
        return len(self.lengths) * self.rows_per_request

    @property
    def num_pages(self):
        return self.max_blocks * self.pages_per_block

    def generator(self, salt=0):
        return torch.Generator().manual_seed(self.seed * 1009 + salt)


@st.composite
def shapes(draw, device, **fixed):
    page_size = fixed.get("page_size", draw(st.sampled_from(PAGE_SIZES)))
    pages_per_block = fixed.get("pages_per_block", draw(st.integers(1, 8)))
    # Enough pages to select from in small blocks, without caches of many thousand tokens in large ones.
    max_blocks = fixed.get("max_blocks", draw(st.integers(1, max(2, 600 // (page_size * pages_per_block)))))
    capacity = max_blocks * page_size * pages_per_block
    length = st.one_of(st.integers(0, capacity), st.sampled_from([0, 1, page_size, capacity]))
    drawn = {
        "lengths": tuple(draw(st.lists(length, min_size=1, max_size=3))),
        "max_blocks": max_blocks,
        "page_size": page_size,
        "pages_per_block": pages_per_block,
        "rows_per_request": draw(st.sampled_from([1, 1, 1, 2, 3, 5, 8])),
        "kv_heads": draw(st.integers(1, 3)),
        "group": draw(st.sampled_from(GROUPS)),
        "head_dim": draw(st.sampled_from(HEAD_DIMS)),
        "dtype": draw(st.sampled_from(dtypes(device))),
        "layout": draw(st.sampled_from(LAYOUTS)),
        "metadata_dtype": draw(st.sampled_from(METADATA_DTYPES)),
        "bound": draw(st.sampled_from(BOUNDS)),
        "seed": draw(st.integers(0, 2**20)),
    }
    return Shape(**(drawn | fixed))


@dataclasses.dataclass
class Case:
    query: torch.Tensor  # [R, Hq, D], a slice of a fused projection
    k_cache: torch.Tensor  # [num_blocks, S, Hkv, D], NaN where no request has a token
    v_cache: torch.Tensor
    page_metadata: torch.Tensor  # [num_blocks, Hkv, M, 2, D] or [..., 9 * D / 8], NaN where no request has a token
    block_table: torch.Tensor  # [B, max_blocks] int32, junk past a request's last block
    seq_lens: torch.Tensor  # [R] int32
    request_lens: torch.Tensor  # [B] int32

    def on(self, device, dtype=None):
        """A copy on another device, its floating tensors in `dtype`."""
        moved = {}
        for field in dataclasses.fields(self):
            tensor = getattr(self, field.name)
            moved[field.name] = tensor.to(device, dtype if tensor.is_floating_point() else None, copy=True)
        return Case(**moved)

    def exact(self):
        """What the float64 twins take."""
        return self.on("cpu", torch.float64)


def make_pool(shape, device):
    """k_cache and v_cache `[num_blocks, S, Hkv, D]` full of NaN, as views of the pool of another library."""
    n, s, h, d = shape.num_blocks, shape.block_size, shape.kv_heads, shape.head_dim

    def pool(*size):
        return torch.full(size, torch.nan, dtype=shape.dtype, device=device)

    if shape.layout == "NHD":
        return pool(n, s, h, d), pool(n, s, h, d)
    if shape.layout == "HND":
        return pool(n, h, s, d).transpose(1, 2), pool(n, h, s, d).transpose(1, 2)
    if shape.layout == "flashinfer":
        return pool(n, 2, s, h, d).unbind(1)
    if shape.layout == "vllm":
        return pool(n, h, s, 2 * d).transpose(1, 2).split(d, -1)
    if shape.layout == "quest_ops":
        return pool(n, 2, h, s, d).transpose(2, 3).unbind(1)
    raise ValueError(shape.layout)


def make_metadata(shape, device):
    dtype = shape.metadata_dtype or shape.dtype
    size = (shape.num_blocks, shape.kv_heads, shape.pages_per_block, *metadata_shape(dtype, shape.head_dim))
    return fill_nan(torch.empty(size, dtype=dtype, device=device))


def fill_nan(metadata):
    """Every number of it becomes NaN: all bits are 1, whatever the dtype; in 4 bits those of the scales."""
    metadata.view(torch.uint8).fill_(0xFF)
    return metadata


def set_nan(metadata, block, head, channel):
    """A channel of a block and head's pages becomes NaN; in 4 bits the 32 channels of its scale."""
    of_head = metadata[block, head]
    if metadata.dtype == INT4:
        scales = of_head[:, of_head.size(-1) * 8 // 9 :].view(torch.float16)
        scales.unflatten(-1, (2, -1))[..., channel // 32] = torch.nan
    else:
        of_head[..., channel] = torch.nan


def numbers_of(metadata):
    """`[..., 2, D]`: metadata as it is, or what it stands for in 4 bits."""
    return reference.unpack_bounds(metadata.cpu()).to(metadata.device) if metadata.dtype == INT4 else metadata


def make_block_table(shape):
    """`[B, max_blocks]` int32 on the CPU: distinct blocks in random order, no junk."""
    blocks = torch.randperm(shape.num_blocks, generator=shape.generator(1))
    return blocks[: len(shape.lengths) * shape.max_blocks].view(len(shape.lengths), shape.max_blocks).int()


def with_junk(block_table, shape):
    """A copy whose entries past each request's last block must not be followed."""
    block_table = block_table.clone()
    for b, length in enumerate(shape.lengths):
        for i in range(-(-length // shape.block_size), shape.max_blocks):
            block_table[b, i] = JUNK_BLOCKS[i % len(JUNK_BLOCKS)]
    return block_table


def slots_of(block_table, request, start, stop, block_size):
    """int64 slots of tokens [start, stop) of a request."""
    tokens = torch.arange(start, stop)
    return block_table[request, tokens // block_size].long() * block_size + tokens % block_size


def row_lengths(shape):
    t = shape.rows_per_request
    return torch.tensor([max(0, n - t + 1 + i) for n in shape.lengths for i in range(t)], dtype=torch.int32)


def fused_slices(shape, rows, generator, device):
    """query, key, value as the slices of one projection's output `[rows, (Hq + 2 Hkv) * D]`."""
    heads = [shape.num_heads, shape.kv_heads, shape.kv_heads]
    fused = torch.randn(rows, sum(heads) * shape.head_dim, generator=generator).to(device, shape.dtype)
    parts = fused.split([h * shape.head_dim for h in heads], -1)
    return tuple(part.unflatten(-1, (h, shape.head_dim)) for part, h in zip(parts, heads, strict=True))


def build(shape, device, keys=None):
    """A cache of `shape.lengths` tokens with random values and random keys, or keys `keys[b]` `[length, Hkv, D]`."""
    generator = shape.generator(2)
    k_cache, v_cache = make_pool(shape, "cpu")
    page_metadata = make_metadata(shape, "cpu")
    block_table = make_block_table(shape)
    request_lens = torch.tensor(shape.lengths, dtype=torch.int32)
    for b, length in enumerate(shape.lengths):
        tokens = torch.arange(length)
        blocks, offsets = block_table[b, tokens // shape.block_size].long(), tokens % shape.block_size
        size = (length, shape.kv_heads, shape.head_dim)
        k = torch.randn(size, generator=generator) if keys is None else keys[b]
        k_cache[blocks, offsets] = k.to(shape.dtype)
        v_cache[blocks, offsets] = torch.randn(size, generator=generator).to(shape.dtype)
    starts = torch.zeros_like(request_lens)
    reference.update_page_metadata(k_cache, page_metadata, block_table, request_lens, starts, **shape.bound_options)
    if device != "cpu":
        on_cpu = k_cache, v_cache
        k_cache, v_cache = make_pool(shape, device)
        k_cache.copy_(on_cpu[0])
        v_cache.copy_(on_cpu[1])
    query, _, _ = fused_slices(shape, shape.num_rows, generator, device)
    return Case(
        query,
        k_cache,
        v_cache,
        page_metadata.to(device),
        with_junk(block_table, shape).to(device),
        row_lengths(shape).to(device),
        request_lens.to(device),
    )


def pages_of_rows(seq_lens, page_size):
    return [-(-n // page_size) for n in seq_lens.tolist()]


def random_page_ids(shape, heads, budget, device):
    """page_ids `[R, heads, budget]`, for each row and head an ascending random subset, and page_counts `[R, heads]`."""
    generator = shape.generator(3)
    page_ids = torch.full((shape.num_rows, heads, budget), -1, dtype=torch.int32)
    page_counts = torch.zeros(shape.num_rows, heads, dtype=torch.int32)
    for r, pages in enumerate(pages_of_rows(row_lengths(shape), shape.page_size)):
        for h in range(heads):
            count = int(torch.randint(0, min(pages, budget) + 1, (), generator=generator))
            page_ids[r, h, :count] = torch.randperm(pages, generator=generator)[:count].sort().values.int()
            page_counts[r, h] = count
    return page_ids.to(device), page_counts.to(device)


def assert_same_bits(actual, expected):
    """Equal bit for bit, but for the sign and payload of a NaN."""
    actual, expected = actual.cpu(), expected.cpu()
    assert actual.shape == expected.shape and actual.dtype == expected.dtype
    if actual.is_floating_point():
        nan = actual.isnan()
        assert torch.equal(nan, expected.isnan()), "NaN in different places"
        integer = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[actual.element_size()]
        actual = actual.contiguous().view(integer).masked_fill(nan, 0)
        expected = expected.contiguous().view(integer).masked_fill(nan, 0)
    differing = (actual != expected).nonzero()
    assert len(differing) == 0, f"{len(differing)} of {actual.numel()} differ, the first at {differing[0].tolist()}"


def assert_attention_close(out, lse, exact_out, exact_lse, where=None):
    """`out`, `lse` of an op against a float64 twin's; `where` `[R, Hq]` leaves out the rest."""
    assert out.dtype in OUT_TOLERANCE and lse.dtype == torch.float32
    tolerance = OUT_TOLERANCE[out.dtype]
    out, lse = out.cpu().double(), lse.cpu().double()
    where = torch.ones_like(lse, dtype=torch.bool) if where is None else where
    torch.testing.assert_close(out[where], exact_out[where], rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(lse[where], exact_lse[where], rtol=0, atol=LSE_TOLERANCE)


def score_tolerance(exact_case, page_size, head_reduction):
    """float64 `[R, Hs, P]`: how far float32 sums may be from the scores: SCORE_TOLERANCE of the terms' magnitudes."""
    # |q| . max(|lo|, |hi|) is the score of a query without signs on a box that is symmetric about 0.
    radius = numbers_of(exact_case.page_metadata).double().abs().amax(-2, keepdim=True)
    magnitude = reference.estimate_page_scores(
        exact_case.query.abs(),
        torch.cat([-radius, radius], -2),
        exact_case.block_table,
        exact_case.seq_lens,
        page_size,
        head_reduction,
    )
    return SCORE_TOLERANCE * magnitude.clamp(min=1e-3)


def assert_same_selection(ids_a, ids_b, scores64, tol):
    """The same pages, but for pages whose scores differ by at most `tol` (a number, or `[R, Hs]`) at the cut."""
    ids_a, ids_b = ids_a.cpu(), ids_b.cpu()
    assert ids_a.shape == ids_b.shape
    tol = torch.as_tensor(tol, dtype=torch.float64).expand(ids_a.shape[:2])
    for r, h in (ids_a != ids_b).any(-1).nonzero().tolist():
        a = set(ids_a[r, h].tolist()) - {-1}
        b = set(ids_b[r, h].tolist()) - {-1}
        assert len(a) == len(b), f"row {r}, head {h}: {len(a)} and {len(b)} pages"
        swapped = scores64[r, h, sorted(a ^ b)]
        spread = swapped.max() - swapped.min()
        assert spread <= tol[r, h], f"row {r}, head {h}: {sorted(a - b)} for {sorted(b - a)}, scores {spread:g} apart"


def selection_is_clear(scores64, page_ids, sink_pages, recent_pages, page_size, seq_lens, tol):
    """bool `[R, Hs]`: no page left out is within `tol` `[R, Hs]` of the lowest one that was chosen by its score."""
    clear = torch.ones(page_ids.shape[:2], dtype=torch.bool)
    for r, pages in enumerate(pages_of_rows(seq_lens, page_size)):
        for h in range(page_ids.size(1)):
            chosen = torch.zeros(scores64.size(2), dtype=torch.bool)
            chosen[page_ids[r, h][page_ids[r, h] >= 0].long()] = True
            middle = torch.zeros_like(chosen)
            middle[sink_pages : max(sink_pages, pages - recent_pages)] = True
            inside, outside = scores64[r, h, chosen & middle], scores64[r, h, ~chosen & middle]
            if inside.numel() and outside.numel():
                clear[r, h] = inside.min() - outside.max() > tol[r, h]
    return clear
