// Scores of pages whose metadata is in 4 bits a number (params.h). From several words of codes it takes code i at once;
// the weights of these channels stand together. The channels of a word share a scale, and what a code of 0 to 15 counts
// too much, eight times the weights, is taken off at the start.
#pragma once
#include "isa.h"

namespace quest::cpu::QUEST_CPU_ISA {

constexpr int kTilePages = 4;  // that are scored at once: what sum4 takes

// Weights of kHeads query heads for [lo, hi], each of D channels.
template <int kHeads>
struct PackedWeights {
    alignas(64) float of_code[kHeads][2 * kMaxHeadDim];    // [side, register, code, word]
    alignas(64) float start[kHeads][2 * kMaxHeadDim / 8];  // [side, register, word]

    // Of points both sides have the same: weights [D], else [2 D].
    template <typename Row>
    void take(Row&& weights_of, int heads, int head_dim, bool points) {
        for (int g = 0; g < heads; ++g) {
            for (int side = 0; side < 2; ++side) {
                const float* weights = weights_of(g) + (points ? 0 : side * head_dim);
                float* code = of_code[g] + side * head_dim;
                float* first = start[g] + side * head_dim / 8;
                for (int c = 0; c < head_dim / kScaledChannels; ++c) {
                    for (int t = 0; t < 4; ++t) {
                        const int word = packed_word(head_dim, c, t),
                                  at = word / kWordLanes * 8 * kWordLanes + word % kWordLanes;
                        float sum = 0;
                        for (int i = 0; i < 8; ++i) {
                            const float weight = weights[kScaledChannels * c + 8 * t + i];
                            code[at + i * kWordLanes] = weight;
                            sum += weight;
                        }
                        first[word] = -8 * sum;
                    }
                }
            }
        }
    }
};

// The lanes' sums over one side of a page for each head.
template <int kHeads>
inline void score_side(const PackedInt4* page, int side, const PackedWeights<kHeads>& w, int head_dim,
                       WordVec (&sums)[kHeads]) {
    const PackedInt4* codes = page + side * head_dim / 2;
    const PackedInt4* scales = page + head_dim + side * head_dim / 16;
    const int repeated = head_dim < 128 ? 2 : 4;  // scales of adjacent words
    for (WordVec& sum : sums) sum = WordVec{};
    const int side_words = side * head_dim / 8;
    for (int word = 0; word < head_dim / 8; word += kWordLanes) {
        WordBits words;
        std::memcpy(&words, codes + word * sizeof(uint32_t), sizeof(words));
        WordVec products[kHeads];
        for (int g = 0; g < kHeads; ++g) products[g] = load_words(w.start[g] + side_words + word);
        for (int i = 0; i < 8; ++i) {
            const WordVec code = codes_of(words, i);
            for (int g = 0; g < kHeads; ++g)
                products[g] =
                    fma(code, load_words(w.of_code[g] + (side_words + word) * 8 + i * kWordLanes), products[g]);
        }
        const WordVec scale = repeat_halves(scales + word / 16 * 8, repeated);
        for (int g = 0; g < kHeads; ++g) sums[g] = fma(products[g], scale, sums[g]);
    }
}

// A tile at once; the last pages repeat the last one. scores[g][page].
template <int kHeads, int kRow>
void score_packed_pages(const PackedInt4* const* pages, int num_pages, const PackedWeights<kHeads>& w, int head_dim,
                        bool points, int ahead, float (*scores)[kRow]) {
    for (int first = 0; first < num_pages; first += kTilePages) {
        WordVec sums[2][kTilePages][kHeads];
        for (int i = 0; i < kTilePages; ++i) {
            prefetch_row(pages[std::min(first + i + ahead, num_pages - 1)], packed_page_bytes(head_dim));
            for (int side = 0; side < 2; ++side)
                score_side(pages[std::min(first + i, num_pages - 1)], side, w, head_dim, sums[side][i]);
        }
        for (int g = 0; g < kHeads; ++g) {
            const auto of_side = [&](int side) {
                const auto& s = sums[side];
                return sum4(s[0][g], s[1][g], s[2][g], s[3][g]);
            };
            const Vec4 lo = of_side(0), hi = of_side(1);
            const Vec4 tile = (points ? ((lo > hi) | (lo != lo)) ? lo : hi : lo + hi) + Vec4{};  // + 0 turns -0 into +0
            std::memcpy(scores[g] + first, &tile, sizeof(tile));
        }
    }
}

}  // namespace quest::cpu::QUEST_CPU_ISA
