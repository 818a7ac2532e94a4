// Softmax attention of each row over its listed pages and its last page, K and V read once for a whole GQA group.
// A list is cut into splits of about 256 tokens, 64 splits at most, whatever the number of threads; their partial
// softmaxes are merged in order. Work item: one split of one list. Bound by reading K and V, so each pass over a tile
// prefetches the rows of the next.
#include <cmath>
#include <limits>
#include <type_traits>

#include "isa.h"

namespace quest::cpu::QUEST_CPU_ISA {
namespace {

constexpr int kSplitTokens = 256;
constexpr int kMaxSplits = 64;
constexpr int kTileTokens = 64;
constexpr int kMaxTileHeads = kLanes == 16 ? 4 : 3;  // 4 tokens by so many heads of sums fit in the registers
constexpr float kInfinity = std::numeric_limits<float>::infinity();

// The query heads that attend to one list of pages: a row's GQA group, or one head where each has its own list.
struct List {
    const int32_t* ids;   // null: every page
    int64_t num_ids;      // the last page comes after them
    int64_t first_split;  // in the numbering of all splits
    int64_t num_splits;
};

struct Split {
    int64_t list;
    int64_t begin, end;  // positions in the list; num_ids is the last page
};

// A split's unnormalised output of one head, [D], is followed by its largest logit and the sum of exp(logit - largest).
int64_t partial_size(const AttentionParams& p) { return p.head_dim + 2; }

template <typename T>
struct Tile {
    const T* keys[kTileTokens];
    const T* values[kTileTokens];
    int count;
};

// Walks the tokens of a split, a tile at a time.
template <typename T>
class TokenWalk {
public:
    TokenWalk(const AttentionParams& p, const List& list, const Split& split, int64_t row, int64_t kv_head)
        : p_(p),
          list_(list),
          position_(split.begin),
          end_(split.end),
          kv_head_(kv_head),
          table_(p.paging.block_table + row / p.rows_per_request * p.paging.table_stride),
          length_(clamp_length(p.seq_lens[row], p.paging.max_pages(), p.paging.page_size)),
          last_page_(ceil_div(length_, p.paging.page_size) - 1) {}

    void next(Tile<T>& tile) {
        tile.count = 0;
        while (tile.count < kTileTokens && (tokens_left_ > 0 || enter_page())) {
            const int n = int(std::min<int64_t>(tokens_left_, kTileTokens - tile.count));
            for (int i = 0; i < n; ++i) {
                tile.keys[tile.count + i] = key_ + i * p_.k_cache.token_stride;
                tile.values[tile.count + i] = value_ + i * p_.v_cache.token_stride;
            }
            key_ += n * p_.k_cache.token_stride;
            value_ += n * p_.v_cache.token_stride;
            tile.count += n;
            tokens_left_ -= n;
        }
    }

private:
    bool enter_page() {
        const Paging& paging = p_.paging;
        while (position_ < end_) {
            const int64_t position = position_++;
            int64_t page = last_page_;
            if (position < list_.num_ids) {
                page = list_.ids == nullptr ? position : list_.ids[position];
                if (page < 0 || page >= last_page_) continue;
            }
            const int64_t block = table_[page / paging.pages_per_block];
            const int64_t offset = page % paging.pages_per_block * paging.page_size;
            key_ = at<T>(p_.k_cache.data, block * p_.k_cache.block_stride + offset * p_.k_cache.token_stride +
                                              kv_head_ * p_.k_cache.head_stride);
            value_ = at<T>(p_.v_cache.data, block * p_.v_cache.block_stride + offset * p_.v_cache.token_stride +
                                                kv_head_ * p_.v_cache.head_stride);
            tokens_left_ = std::min<int64_t>(paging.page_size, length_ - page * paging.page_size);
            // Each page's first lines, a tile early: about a tenth faster on a cold pool.
            __builtin_prefetch(key_);
            __builtin_prefetch(value_);
            return true;
        }
        return false;
    }

    const AttentionParams& p_;
    const List& list_;
    int64_t position_;
    const int64_t end_, kv_head_;
    const int32_t* const table_;
    const int64_t length_, last_page_;
    const T* key_ = nullptr;
    const T* value_ = nullptr;
    int64_t tokens_left_ = 0;
};

// Rows that a later pass reads.
template <typename T>
struct Upcoming {
    const T* const* rows = nullptr;
    int count = 0;

    void prefetch(int i, int head_dim) const {
        if (i < count) prefetch_row(rows[i], head_dim);
    }
};

// logits[g][t] = query[g] . key[t]; the last four repeat the tile's last key.
template <int kHeads, typename T>
void score_tokens(const float (*query)[kMaxHeadDim], int head_dim, const Tile<T>& tile, Upcoming<T> upcoming,
                  float (*logits)[kTileTokens]) {
    for (int first = 0; first < tile.count; first += 4) {
        const T* key[4];
        for (int i = 0; i < 4; ++i) {
            key[i] = tile.keys[std::min(first + i, tile.count - 1)];
            upcoming.prefetch(first + i, head_dim);
        }
        Vec sums[kHeads][4] = {};
        for (int d = 0; d < head_dim; d += kLanes) {
            Vec k[4];
            for (int i = 0; i < 4; ++i) k[i] = load(key[i] + d);
            for (int g = 0; g < kHeads; ++g) {
                const Vec q = load(query[g] + d);
                for (int i = 0; i < 4; ++i) sums[g][i] = fma(k[i], q, sums[g][i]);
            }
        }
        for (int g = 0; g < kHeads; ++g) {
            const Vec4 dots = sum4(sums[g][0], sums[g][1], sums[g][2], sums[g][3]);
            std::memcpy(logits[g] + first, &dots, sizeof(dots));
        }
    }
}

// Turns a tile's logits into exp(logit - largest); returns by how much earlier sums must be scaled.
float exponentiate(float* logits, int count, float& largest, float& sum_of_exp) {
    for (int t = count; t < kTileTokens; ++t) logits[t] = -kInfinity;
    float tile_largest = largest;
    for (int t = 0; t < count; ++t) tile_largest = logits[t] > tile_largest ? logits[t] : tile_largest;
    // Where every logit is -inf so far, exp(-inf - 0) = 0.
    const float base = tile_largest == -kInfinity ? 0 : tile_largest;
    Vec total{};
    for (int t = 0; t < kTileTokens; t += kLanes) {
        const Vec weights = exp_nonpositive(load(logits + t) - base);
        store(logits + t, weights);
        total += weights;
    }
    const float rescale = std::exp(largest - base);
    sum_of_exp = sum_of_exp * rescale + sum(total);
    largest = tile_largest;
    return rescale;
}

// acc[g] = acc[g] * rescale[g] + sum over t of weights[g][t] * value[t], for kVecs vectors of the head dimension.
template <int kHeads, int kVecs, typename T>
void add_values(const Tile<T>& tile, int d, const float (*weights)[kTileTokens], const float* rescale,
                Upcoming<T> upcoming, int head_dim, float* acc, int64_t acc_stride) {
    Vec sums[kHeads][kVecs];
    for (int g = 0; g < kHeads; ++g) {
        for (int j = 0; j < kVecs; ++j) sums[g][j] = load(acc + g * acc_stride + d + j * kLanes) * rescale[g];
    }
    for (int t = 0; t < tile.count; ++t) {
        upcoming.prefetch(t, head_dim);
        for (int j = 0; j < kVecs; ++j) {
            const Vec value = load(tile.values[t] + d + j * kLanes);
            for (int g = 0; g < kHeads; ++g) sums[g][j] = fma(value, broadcast(weights[g][t]), sums[g][j]);
        }
    }
    for (int g = 0; g < kHeads; ++g) {
        for (int j = 0; j < kVecs; ++j) store(acc + g * acc_stride + d + j * kLanes, sums[g][j]);
    }
}

// Adds one tile to the partial softmaxes of kHeads heads; prefetches values while scoring, next_keys while adding.
template <int kHeads, typename T>
void attend_tile(const float (*query)[kMaxHeadDim], int head_dim, const Tile<T>& tile, Upcoming<T> values,
                 Upcoming<T> next_keys, float* partials, int64_t stride) {
    alignas(64) float weights[kHeads][kTileTokens];
    float rescale[kHeads];
    score_tokens<kHeads>(query, head_dim, tile, values, weights);
    for (int g = 0; g < kHeads; ++g) {
        float* state = partials + g * stride + head_dim;
        rescale[g] = exponentiate(weights[g], tile.count, state[0], state[1]);
    }
    constexpr int kVecs = 4;
    int d = 0;
    for (; d + kVecs * kLanes <= head_dim; d += kVecs * kLanes) {
        add_values<kHeads, kVecs>(tile, d, weights, rescale, d == 0 ? next_keys : Upcoming<T>{}, head_dim, partials,
                                  stride);
    }
    for (; d < head_dim; d += kLanes) {
        add_values<kHeads, 1>(tile, d, weights, rescale, {}, head_dim, partials, stride);
    }
}

template <typename T>
void attend_split(const AttentionParams& p, const List& list, const Split& split, int64_t row, int64_t first_head,
                  int heads, float* partials) {
    const int64_t stride = partial_size(p);
    for (int g = 0; g < heads; ++g) {
        std::fill(partials + g * stride, partials + (g + 1) * stride, 0.0f);
        partials[g * stride + p.head_dim] = -kInfinity;
    }
    Scratch<float[kMaxHeadDim]> query(heads);
    const Vec scale = broadcast(p.sm_scale);
    for (int g = 0; g < heads; ++g) {
        const T* q = at<T>(p.query.data, row * p.query.row_stride + (first_head + g) * p.query.head_stride);
        for (int d = 0; d < p.head_dim; d += kLanes) store(query[g] + d, load(q + d) * scale);
    }

    const int64_t kv_head = first_head * p.num_kv_heads / p.num_q_heads;
    TokenWalk<T> walk(p, list, split, row, kv_head);
    Tile<T> tiles[2];
    walk.next(tiles[0]);
    for (int t = 0; t < tiles[0].count; ++t) prefetch_row(tiles[0].keys[t], p.head_dim);
    for (int current = 0; tiles[current].count > 0; current ^= 1) {
        const Tile<T>& tile = tiles[current];
        Tile<T>& next = tiles[current ^ 1];
        walk.next(next);
        for (int g = 0; g < heads; g += kMaxTileHeads) {
            const bool first = g == 0, last = g + kMaxTileHeads >= heads;
            const Upcoming<T> values = first ? Upcoming<T>{tile.values, tile.count} : Upcoming<T>{};
            const Upcoming<T> next_keys = last ? Upcoming<T>{next.keys, next.count} : Upcoming<T>{};
            const auto attend = [&](auto tile_heads) {
                attend_tile<tile_heads>(query.data() + g, p.head_dim, tile, values, next_keys, partials + g * stride,
                                        stride);
            };
            switch (std::min(kMaxTileHeads, heads - g)) {
                case 1: attend(std::integral_constant<int, 1>{}); break;
                case 2: attend(std::integral_constant<int, 2>{}); break;
                case 3: attend(std::integral_constant<int, 3>{}); break;
                default: attend(std::integral_constant<int, kMaxTileHeads>{}); break;
            }
        }
    }
}

// Merges the splits of one head, in order.
template <typename T>
void merge_splits(const AttentionParams& p, const float* partials, int64_t split_stride, int64_t num_splits, T* out,
                  float* lse) {
    float largest = -kInfinity, sum_of_exp = 0;
    for (int64_t s = 0; s < num_splits; ++s) {
        const float m = partials[s * split_stride + p.head_dim];
        largest = m > largest ? m : largest;
    }
    const float base = largest == -kInfinity ? 0 : largest;
    alignas(64) float acc[kMaxHeadDim] = {};
    for (int64_t s = 0; s < num_splits; ++s) {
        const float* partial = partials + s * split_stride;
        const float weight = std::exp(partial[p.head_dim] - base);
        sum_of_exp += partial[p.head_dim + 1] * weight;
        for (int d = 0; d < p.head_dim; d += kLanes) {
            store(acc + d, fma(load(partial + d), broadcast(weight), load(acc + d)));
        }
    }
    const float divisor = num_splits == 0 ? 1 : sum_of_exp;  // an empty slot's output is zero
    for (int d = 0; d < p.head_dim; d += kLanes) store(out + d, load(acc + d) / divisor);
    *lse = base + std::log(sum_of_exp);
}

int64_t count_ids(const AttentionParams& p, int64_t row, int64_t id_head, const int32_t* ids, int64_t num_pages) {
    if (ids == nullptr) return num_pages - 1;
    if (p.page_counts != nullptr) {
        return std::max(0, std::min(p.page_counts[row * p.id_heads + id_head], p.max_ids));
    }
    int64_t count = 0;
    while (count < p.max_ids && ids[count] >= 0) ++count;
    return count;
}

List make_list(const AttentionParams& p, int64_t row, int64_t head, int64_t first_split) {
    const int64_t page_size = p.paging.page_size;
    const int64_t num_pages = ceil_div(clamp_length(p.seq_lens[row], p.paging.max_pages(), page_size), page_size);
    if (num_pages == 0) return {nullptr, 0, first_split, 0};
    const int64_t id_head = p.id_heads * head / p.num_q_heads;
    const int32_t* ids = p.page_ids == nullptr ? nullptr : p.page_ids + (row * p.id_heads + id_head) * p.max_ids;
    const int64_t num_ids = count_ids(p, row, id_head, ids, num_pages);
    const int64_t pages = num_ids + 1;
    const int64_t wanted = ceil_div(pages * page_size, kSplitTokens);
    return {ids, num_ids, first_split, std::max<int64_t>(1, std::min<int64_t>(wanted, kMaxSplits))};
}

}  // namespace

void sparse_decode_attention(const AttentionParams& p) {
    const bool list_a_head = p.page_ids != nullptr && p.id_heads == p.num_q_heads;
    const int heads = list_a_head ? 1 : p.num_q_heads / p.num_kv_heads;  // of a list
    const int64_t lists_a_row = p.num_q_heads / heads;
    const int64_t num_lists = p.num_rows * lists_a_row;

    Scratch<List> lists(num_lists);
    int64_t num_splits = 0, longest = 0;
    for (int64_t i = 0; i < num_lists; ++i) {
        lists[i] = make_list(p, i / lists_a_row, i % lists_a_row * heads, num_splits);
        num_splits += lists[i].num_splits;
        longest = std::max(longest, lists[i].num_ids + 1);
    }
    Scratch<Split> splits(num_splits);
    for (int64_t i = 0; i < num_lists; ++i) {
        const List& list = lists[i];
        for (int64_t s = 0; s < list.num_splits; ++s) {
            const int64_t pages = list.num_ids + 1;
            splits[list.first_split + s] = {i, pages * s / list.num_splits, pages * (s + 1) / list.num_splits};
        }
    }

    Scratch<float> partials(num_splits * heads * partial_size(p));
    with_dtype(p.dtype, [&](auto element) {
        using T = decltype(element);
        const int64_t tokens = std::max<int64_t>(kSplitTokens, longest * p.paging.page_size / kMaxSplits);
        const int64_t split_grain = grain_for(int64_t(sizeof(T)) * 2 * p.head_dim * tokens);
        parallel_for(num_splits, split_grain, [&](int64_t begin, int64_t end) {
            for (int64_t i = begin; i < end; ++i) {
                const int64_t list = splits[i].list;
                attend_split<T>(p, lists[list], splits[i], list / lists_a_row, list % lists_a_row * heads, heads,
                                partials.data() + i * heads * partial_size(p));
            }
        });
        const int64_t splits_a_list = ceil_div(num_splits, std::max<int64_t>(num_lists, 1));
        const int64_t merge_grain = grain_for(int64_t(sizeof(float)) * p.head_dim * splits_a_list);
        parallel_for(int64_t(p.num_rows) * p.num_q_heads, merge_grain, [&](int64_t begin, int64_t end) {
            for (int64_t i = begin; i < end; ++i) {
                const int64_t row = i / p.num_q_heads, head = i % p.num_q_heads;
                const List& list = lists[row * lists_a_row + head / heads];
                const float* first = partials.data() + (list.first_split * heads + head % heads) * partial_size(p);
                merge_splits(p, first, heads * partial_size(p), list.num_splits,
                             at<T>(p.out.data, row * p.out.row_stride + head * p.out.head_stride), p.lse + i);
            }
        });
    });
}

}  // namespace quest::cpu::QUEST_CPU_ISA
