// score(page) = q+ . hi + q- . lo for every page of a row, reduced over a GQA group (QUEST, Tang et al. 2024); of
// points max(q . lo, q . hi). Work item: 128 pages of one request and KV head, for each of the request's rows. Bound by
// reading the metadata.
#include <limits>
#include <type_traits>

#include "packed_scores.h"

namespace quest::cpu::QUEST_CPU_ISA {
namespace {

constexpr int kChunkPages = 128;
constexpr int kMaxTileHeads = kLanes == 16 ? 4 : 3;  // 4 pages by so many heads of sums fit in the registers
constexpr int kPrefetchBytes = 4096;                 // so many in flight cover the latency

// How many pages of `length` numbers a prefetch runs ahead: a tile at least.
template <typename Bound>
int pages_ahead(int length) {
    return std::max(kTilePages, kPrefetchBytes / (length * int(sizeof(Bound))));
}

// Query heads as the weights of a page's [lo, hi]: q- then q+, each [2 D]; of points q, [D].
struct Weights {
    alignas(64) float of_head[kMaxTileHeads][2 * kMaxHeadDim];
};

template <typename T>
void load_weights(const T* query, int64_t head_stride, int heads, int head_dim, Weights& w) {
    for (int g = 0; g < heads; ++g) {
        for (int d = 0; d < head_dim; d += kLanes) {
            const Vec q = load(query + g * head_stride + d);
            store(w.of_head[g] + d, min_nan(q, Vec{}));
            store(w.of_head[g] + head_dim + d, max_nan(q, Vec{}));
        }
    }
}

template <typename T>
void load_whole_weights(const T* query, int64_t head_stride, int heads, int head_dim, Weights& w) {
    for (int g = 0; g < heads; ++g)
        for (int d = 0; d < head_dim; d += kLanes) store(w.of_head[g] + d, load(query + g * head_stride + d));
}

// The mean over a group of the bounds is the bound of its mean q- and mean q+.
template <typename T>
void load_mean_weights(const T* query, int64_t head_stride, int group, int head_dim, Weights& w) {
    const Vec size = broadcast(float(group));
    for (int d = 0; d < head_dim; d += kLanes) {
        Vec negative{}, positive{};
        for (int g = 0; g < group; ++g) {
            const Vec q = load(query + g * head_stride + d);
            negative += min_nan(q, Vec{});
            positive += max_nan(q, Vec{});
        }
        store(w.of_head[0] + d, negative / size);
        store(w.of_head[0] + head_dim + d, positive / size);
    }
}

// 2 * kLanes bounds, divided by kBoundsScale: of 8 bits a 256th is cheaper to make, and only the sums are scaled back.
template <typename Bound>
void load_bounds(const Bound* p, Vec (&v)[2]) {
    v[0] = load(p);
    v[1] = load(p + kLanes);
}
void load_bounds(const Float8E4M3* p, Vec (&v)[2]) { load_256ths(p, v); }

template <typename Bound>
constexpr float kBoundsScale = std::is_same_v<Bound, Float8E4M3> ? 256 : 1;

// Scores of num_pages pages for kHeads heads. Every page goes through the same instructions wherever it lies: the last
// tile repeats its last page. Equal pages therefore tie bit for bit.
template <int kHeads, typename Bound>
void score_pages(const Bound* const* pages, int num_pages, const Weights& w, int length, float (*scores)[kChunkPages]) {
    const int ahead = pages_ahead<Bound>(length);
    for (int first = 0; first < num_pages; first += kTilePages) {
        const Bound* page[kTilePages];
        for (int i = 0; i < kTilePages; ++i) {
            page[i] = pages[std::min(first + i, num_pages - 1)];
            prefetch_row(pages[std::min(first + i + ahead, num_pages - 1)], length);
        }
        Vec sums[kHeads][kTilePages] = {};
        for (int d = 0; d < length; d += 2 * kLanes) {
            Vec bounds[kTilePages][2];
            for (int i = 0; i < kTilePages; ++i) load_bounds(page[i] + d, bounds[i]);
            for (int half = 0; half < 2; ++half) {
                for (int g = 0; g < kHeads; ++g) {
                    const Vec weight = load(w.of_head[g] + d + half * kLanes);
                    for (int i = 0; i < kTilePages; ++i) sums[g][i] = fma(bounds[i][half], weight, sums[g][i]);
                }
            }
        }
        for (int g = 0; g < kHeads; ++g) {
            // + 0 turns -0 into +0.
            const Vec4 tile = sum4(sums[g][0], sums[g][1], sums[g][2], sums[g][3]) * kBoundsScale<Bound> + Vec4{};
            std::memcpy(scores[g] + first, &tile, sizeof(tile));
        }
    }
}

// How many of a tile's heads there are, known to the compiler.
template <typename F>
void with_heads(int heads, F&& f) {
    switch (heads) {
        case 1: return f(std::integral_constant<int, 1>{});
        case 2: return f(std::integral_constant<int, 2>{});
        case 3: return f(std::integral_constant<int, 3>{});
        default: return f(std::integral_constant<int, kMaxTileHeads>{});
    }
}

template <int kHeads>
void score_packed(const PackedInt4* const* pages, int num_pages, const Weights& w, int head_dim, bool points,
                  float (*scores)[kChunkPages]) {
    PackedWeights<kHeads> packed;
    packed.take([&](int g) { return w.of_head[g]; }, kHeads, head_dim, points);
    score_packed_pages(pages, num_pages, packed, head_dim, points, pages_ahead<PackedInt4>(packed_page_bytes(head_dim)),
                       scores);
}

void max_into(float* best, const float* scores) {
    for (int i = 0; i < kChunkPages; i += kLanes) store(best + i, max_nan(load(best + i), load(scores + i)));
}
void add_into(float* sum, const float* scores) {
    for (int i = 0; i < kChunkPages; i += kLanes) store(sum + i, load(sum + i) + load(scores + i));
}

template <typename T, typename Bound>
void score_chunk(const EstimateParams& p, int64_t row, int kv_head, int64_t first_page, const Bound* const* pages,
                 int num_pages) {
    const int group = p.num_q_heads / p.num_kv_heads;
    const T* query = at<T>(p.query.data, row * p.query.row_stride + kv_head * group * p.query.head_stride);
    const int64_t max_pages = p.paging.max_pages();
    const auto scores_of = [&](int64_t heads, int64_t head) {
        return p.scores + (row * heads + head) * max_pages + first_page;
    };
    const bool points = p.metadata.points, mean = p.head_reduction == HeadReduction::kMean;
    Weights w;
    alignas(64) float scores[kMaxTileHeads][kChunkPages] = {};
    const auto score = [&](int heads) {
        with_heads(heads, [&](auto known) {
            if constexpr (std::is_same_v<Bound, PackedInt4>) {
                score_packed<known()>(pages, num_pages, w, p.head_dim, points, scores);
            } else {
                score_pages<known()>(pages, num_pages, w, points ? p.head_dim : 2 * p.head_dim, scores);
                if (!points) return;
                alignas(64) float of_second[kMaxTileHeads][kChunkPages] = {};
                const Bound* second[kChunkPages];
                for (int i = 0; i < num_pages; ++i) second[i] = pages[i] + p.head_dim;
                score_pages<known()>(second, num_pages, w, p.head_dim, of_second);
                for (int i = 0; i < heads; ++i) max_into(scores[i], of_second[i]);
            }
        });
    };

    if (mean && !points) {
        load_mean_weights(query, p.query.head_stride, group, p.head_dim, w);
        score(1);
        std::memcpy(scores_of(p.num_kv_heads, kv_head), scores[0], sizeof(float) * num_pages);
        return;
    }
    alignas(64) float of_group[kChunkPages];
    for (float& x : of_group) x = mean ? 0 : -std::numeric_limits<float>::infinity();
    for (int g = 0; g < group; g += kMaxTileHeads) {
        const int heads = std::min(kMaxTileHeads, group - g);
        const T* tile = query + g * p.query.head_stride;
        points ? load_whole_weights(tile, p.query.head_stride, heads, p.head_dim, w)
               : load_weights(tile, p.query.head_stride, heads, p.head_dim, w);
        score(heads);
        for (int i = 0; i < heads; ++i) {
            if (p.head_reduction == HeadReduction::kNone) {
                std::memcpy(scores_of(p.num_q_heads, kv_head * group + g + i), scores[i], sizeof(float) * num_pages);
            } else {
                mean ? add_into(of_group, scores[i]) : max_into(of_group, scores[i]);
            }
        }
    }
    if (p.head_reduction == HeadReduction::kNone) return;
    if (mean)
        for (float& x : of_group) x /= float(group);
    std::memcpy(scores_of(p.num_kv_heads, kv_head), of_group, sizeof(float) * num_pages);
}

// One chunk of a request's pages and one KV head, for each row of the request.
template <typename T, typename Bound>
void estimate_item(const EstimateParams& p, int64_t request, int kv_head, int64_t first_page) {
    const Paging& paging = p.paging;
    const int64_t first_row = request * p.rows_per_request;
    const auto pages_of_row = [&](int64_t row) {
        const int64_t length = clamp_length(p.seq_lens[row], paging.max_pages(), paging.page_size);
        const int64_t num_pages = ceil_div(length, paging.page_size);
        const int64_t left = num_pages <= p.skip_pages ? 0 : num_pages - first_page;
        return int(std::max<int64_t>(0, std::min<int64_t>(left, kChunkPages)));
    };
    int most = 0;
    for (int64_t t = 0; t < p.rows_per_request; ++t) most = std::max(most, pages_of_row(first_row + t));

    const Bound* pages[kChunkPages];
    const int32_t* table = paging.block_table + request * paging.table_stride;
    for (int i = 0; i < most; ++i) {
        const int64_t page = first_page + i;
        pages[i] = page_bounds<Bound>(p.metadata, table[page / paging.pages_per_block], kv_head,
                                      page % paging.pages_per_block, p.head_dim);
    }
    const int elements = page_elements<Bound>(p.head_dim), ahead = pages_ahead<Bound>(elements);
    for (int i = 0; i < std::min(most, ahead); ++i) prefetch_row(pages[i], elements);
    for (int64_t t = 0; t < p.rows_per_request; ++t) {
        const int num_pages = pages_of_row(first_row + t);
        if (num_pages > 0) score_chunk<T>(p, first_row + t, kv_head, first_page, pages, num_pages);
    }
}

void fill_tail(const EstimateParams& p) {
    const int64_t heads = p.head_reduction == HeadReduction::kNone ? p.num_q_heads : p.num_kv_heads;
    const int64_t max_pages = p.paging.max_pages();
    for (int64_t i = 0; i < p.num_rows * heads; ++i) {
        const int64_t length = clamp_length(p.seq_lens[i / heads], max_pages, p.paging.page_size);
        std::fill(p.scores + i * max_pages + ceil_div(length, p.paging.page_size), p.scores + (i + 1) * max_pages,
                  -std::numeric_limits<float>::infinity());
    }
}

}  // namespace

void estimate_page_scores(const EstimateParams& p) {
    int64_t longest = 0;
    for (int64_t r = 0; r < p.num_rows; ++r) longest = std::max<int64_t>(longest, p.seq_lens[r]);
    longest = clamp_length(longest, p.paging.max_pages(), p.paging.page_size);
    const int64_t most_pages = ceil_div(longest, p.paging.page_size);
    const int64_t chunks = ceil_div(most_pages, kChunkPages);
    const int64_t requests = p.num_rows / std::max(p.rows_per_request, 1);

    with_dtypes(p.dtype, p.metadata.dtype, [&](auto element, auto bound) {
        using T = decltype(element);
        using Bound = decltype(bound);
        const int64_t pages_an_item = std::min<int64_t>(kChunkPages, most_pages);
        const int64_t grain = grain_for(int64_t(sizeof(Bound)) * page_elements<Bound>(p.head_dim) * pages_an_item);
        parallel_for(requests * p.num_kv_heads * chunks, grain, [&](int64_t begin, int64_t end) {
            for (int64_t i = begin; i < end; ++i) {
                const int64_t pair = i / chunks;
                estimate_item<T, Bound>(p, pair / p.num_kv_heads, int(pair % p.num_kv_heads), i % chunks * kChunkPages);
            }
        });
    });
    if (p.fill_tail) fill_tail(p);
}

}  // namespace quest::cpu::QUEST_CPU_ISA
