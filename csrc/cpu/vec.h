// The one place that knows vector registers: kLanes floats, loaded from and stored to float, half, bfloat16 and e4m3.
// Compiled once for each instruction set, in its own namespace; elsewhere than on x86 the compiler's own vectors serve.
#pragma once
#include <cstdint>
#include <cstring>

#include "../params.h"

#if defined(__x86_64__)
#if defined(__GNUC__) && !defined(__clang__)
// GCC bug 105593: its AVX-512 intrinsics' deliberately undefined operands are reported.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#else
#include <immintrin.h>
#endif
#endif

namespace quest::cpu::QUEST_CPU_ISA {

struct Half {
    uint16_t bits;
};
struct BFloat16 {
    uint16_t bits;
};
struct Float8E4M3 {
    uint8_t bits;
};
// A byte of a page's metadata in 4 bits: two codes, or half of a scale.
struct PackedInt4 {
    uint8_t bits;
};

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

// GCC and clang give these types +, -, *, /, comparisons and ?: lane by lane.
typedef float Vec __attribute__((vector_size(4 * kLanes)));
typedef int32_t IntVec __attribute__((vector_size(4 * kLanes)));
typedef float Vec4 __attribute__((vector_size(16)));

inline Vec broadcast(float x) { return x - Vec{}; }  // x - 0 keeps -0; x + 0 would not

inline Vec load(const float* p) {
    Vec v;
    std::memcpy(&v, p, sizeof(v));
    return v;
}

inline void store(float* p, Vec v) { std::memcpy(p, &v, sizeof(v)); }

// Round to nearest, ties to even.
inline uint16_t half_from_float(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof(bits));
    const uint16_t sign = uint16_t(bits >> 16 & 0x8000);
    bits &= 0x7fffffff;
    if (bits > 0x7f800000) return sign | 0x7e00;
    if (bits >= 0x477ff000) return sign | 0x7c00;  // 65520, halfway past the largest half, and above
    if (bits < 0x38800000) {                       // below 2^-14: adding 0.5 leaves a multiple of 2^-24 in the low bits
        float magnitude;
        std::memcpy(&magnitude, &bits, sizeof(bits));
        magnitude += 0.5f;
        std::memcpy(&bits, &magnitude, sizeof(bits));
        return sign | uint16_t(bits - 0x3f000000);
    }
    return sign | uint16_t((bits - 0x38000000 + 0xfff + (bits >> 13 & 1)) >> 13);
}

#if defined(__AVX512F__)

inline Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }

inline Vec square_root(Vec v) { return _mm512_sqrt_ps(v); }

// Either being NaN, the result is.
inline Vec max_nan(Vec a, Vec b) {
    return _mm512_mask_mov_ps(_mm512_max_ps(a, b), _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q), a);
}
inline Vec min_nan(Vec a, Vec b) {
    return _mm512_mask_mov_ps(_mm512_min_ps(a, b), _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q), a);
}

inline Vec load(const BFloat16* p) {
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}

inline Vec load(const Half* p) { return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }

// 2 * kLanes numbers, a 256th of each: what their bits are as a half's sign, low exponent bits and high mantissa bits.
inline void load_256ths(const Float8E4M3* p, Vec (&v)[2]) {
    const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    const __m512i moved = _mm512_slli_epi16(_mm512_cvtepi8_epi16(bytes), 7);
    // Bit 14 repeats the sign and must be 0, but 1 with a NaN, whose exponent is then full. Adding 1 to the 7 bits
    // below flips it with a NaN alone.
    const __m512i added = _mm512_add_epi16(moved, _mm512_set1_epi16(0x80));
    const __m512i half = _mm512_xor_si512(moved, _mm512_and_si512(added, _mm512_set1_epi16(0x4000)));
    v[0] = _mm512_cvtph_ps(_mm512_castsi512_si256(half));
    v[1] = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(half, 1));
}

inline void store(Half* p, Vec v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}

inline Vec4 fold(Vec v) {
    const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
    return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}

#elif defined(__AVX2__)

inline Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }

inline Vec square_root(Vec v) { return _mm256_sqrt_ps(v); }

inline Vec max_nan(Vec a, Vec b) { return _mm256_blendv_ps(_mm256_max_ps(a, b), a, _mm256_cmp_ps(a, a, _CMP_UNORD_Q)); }
inline Vec min_nan(Vec a, Vec b) { return _mm256_blendv_ps(_mm256_min_ps(a, b), a, _mm256_cmp_ps(a, a, _CMP_UNORD_Q)); }

inline Vec load(const BFloat16* p) {
    const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}

inline Vec load(const Half* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }

inline void load_256ths(const Float8E4M3* p, Vec (&v)[2]) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    const __m256i moved = _mm256_slli_epi16(_mm256_cvtepi8_epi16(bytes), 7);
    const __m256i added = _mm256_add_epi16(moved, _mm256_set1_epi16(0x80));
    const __m256i half = _mm256_xor_si256(moved, _mm256_and_si256(added, _mm256_set1_epi16(0x4000)));
    v[0] = _mm256_cvtph_ps(_mm256_castsi256_si128(half));
    v[1] = _mm256_cvtph_ps(_mm256_extracti128_si256(half, 1));
}

inline void store(Half* p, Vec v) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}

inline Vec4 fold(Vec v) { return _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1)); }

#else

inline Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }

inline Vec square_root(Vec v) {
    for (int i = 0; i < kLanes; ++i) v[i] = __builtin_sqrtf(v[i]);
    return v;
}

inline Vec max_nan(Vec a, Vec b) { return ((a > b) | (a != a)) ? a : b; }
inline Vec min_nan(Vec a, Vec b) { return ((a < b) | (a != a)) ? a : b; }

inline Vec load(const BFloat16* p) {
    uint32_t bits[kLanes];
    for (int i = 0; i < kLanes; ++i) bits[i] = uint32_t(p[i].bits) << 16;
    Vec v;
    std::memcpy(&v, bits, sizeof(v));
    return v;
}

inline Vec load(const Half* p) {
    IntVec bits;
    for (int i = 0; i < kLanes; ++i) bits[i] = p[i].bits;
    const IntVec magnitude = (bits & 0x7fff) << 13;
    // Multiplying by 2^112 moves the exponent to float's bias, subnormals included; inf and NaN need it full.
    const IntVec special = ((bits & 0x7c00) == 0x7c00) & 0x7f800000;
    const Vec scaled = reinterpret_cast<Vec>(magnitude) * 0x1p112f;
    return reinterpret_cast<Vec>(reinterpret_cast<IntVec>(scaled) | special | ((bits & 0x8000) << 16));
}

// A 256th of what each byte stands for.
struct E4M3Table {
    float values[256];

    constexpr E4M3Table() : values() {
        for (int bits = 0; bits < 256; ++bits) {
            const int exponent = bits >> 3 & 15, mantissa = bits & 7;
            float value = exponent == 0 ? mantissa / 8.0f : 1 + mantissa / 8.0f;
            for (int e = exponent == 0 ? 1 : exponent; e < 15; ++e) value /= 2;
            if ((bits & 0x7f) == 0x7f) value = __builtin_nanf("");
            values[bits] = bits & 0x80 ? -value : value;
        }
    }
};
constexpr E4M3Table kE4M3;

inline void load_256ths(const Float8E4M3* p, Vec (&v)[2]) {
    for (Vec& half : v) {
        Vec values{};
        for (int i = 0; i < kLanes; ++i) values[i] = kE4M3.values[p[i].bits];
        half = values;
        p += kLanes;
    }
}

inline void store(Half* p, Vec v) {
    for (int i = 0; i < kLanes; ++i) p[i].bits = half_from_float(v[i]);
}

inline Vec4 fold(Vec v) { return v; }

#endif

inline Vec absolute(Vec v) { return reinterpret_cast<Vec>(reinterpret_cast<IntVec>(v) & 0x7fffffff); }

inline void store(BFloat16* p, Vec v) {
    const IntVec bits = reinterpret_cast<IntVec>(v);
    // Round to nearest, ties to even; NaN keeps its sign and becomes quiet.
    const IntVec rounded = bits + 0x7fff + (bits >> 16 & 1);
    const IntVec chosen = v == v ? rounded : bits | 0x400000;
#if defined(__AVX512F__)
    const __m512i high = _mm512_srli_epi32(reinterpret_cast<__m512i>(chosen), 16);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(high));
#else
    for (int i = 0; i < kLanes; ++i) p[i].bits = uint16_t(uint32_t(chosen[i]) >> 16);
#endif
}

enum class Rounding { kDown, kUp, kNearest };  // nearest: ties to even

// The e4m3 bits of v, saturating at +-448. NaN stays; zero is +0.
inline IntVec e4m3_bits(Vec v, Rounding rounding) {
    const IntVec bits = reinterpret_cast<IntVec>(v);
    const IntVec magnitude = bits & 0x7fffffff, negative = bits >> 31;
    const bool nearest = rounding == Rounding::kNearest;
    const IntVec away = rounding == Rounding::kUp ? ~negative : negative;  // from zero
    const IntVec added = nearest ? 0x7ffff + (magnitude >> 20 & 1) : away & 0xfffff;
    const IntVec normal = (magnitude - (120 << 23) + added) >> 20;
    // Below 2^-6 numbers are multiples of 2^-9.
    const IntVec is_small = magnitude < (121 << 23);
    const Vec multiple = reinterpret_cast<Vec>(magnitude & is_small) * 512.0f;
    const IntVec whole = __builtin_convertvector(multiple, IntVec);
    const Vec rest = multiple - __builtin_convertvector(whole, Vec);
    const IntVec odd = -(whole & 1);
    const IntVec small = whole - (nearest ? (rest > 0.5f) | ((rest == 0.5f) & odd) : (rest > 0.0f) & away);
    IntVec result = is_small ? small : normal;
    result = result > 0x7e ? 0x7e - IntVec{} : result;
    result |= (result != 0) & negative & 0x80;
    return v == v ? result : 0x7f - IntVec{};
}

inline void store_bits(Float8E4M3* p, IntVec bits) {
#if defined(__AVX512F__)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(reinterpret_cast<__m512i>(bits)));
#else
    for (int i = 0; i < kLanes; ++i) p[i].bits = uint8_t(bits[i]);
#endif
}

// Of words of codes (params.h), a number from each: no more of them than the eight of a small head.
#if defined(__AVX512F__)
typedef float WordVec __attribute__((vector_size(32)));
inline WordVec fma(WordVec a, WordVec b, WordVec c) { return _mm256_fmadd_ps(a, b, c); }
inline Vec4 fold(WordVec v) { return _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1)); }
#else
typedef Vec WordVec;
#endif
constexpr int kWordLanes = sizeof(WordVec) / 4;
typedef uint32_t WordBits __attribute__((vector_size(sizeof(WordVec))));

inline WordVec load_words(const float* p) {
    WordVec v;
    std::memcpy(&v, p, sizeof(v));
    return v;
}
// Code i of each word.
inline WordVec codes_of(WordBits words, int i) {
    typedef int32_t Ints __attribute__((vector_size(sizeof(WordVec))));
    return __builtin_convertvector(reinterpret_cast<Ints>(words >> packed_shift(i) & 15), WordVec);
}
// `count` (2 or 4) halves, again and again.
inline WordVec repeat_halves(const void* p, int count) {
#if defined(__AVX2__)
    int64_t bits = 0;
    std::memcpy(&bits, p, 4);
    if (count == 2) return _mm256_cvtph_ps(_mm_set1_epi32(int32_t(bits)));
    std::memcpy(&bits, p, 8);
    return _mm256_cvtph_ps(_mm_set1_epi64x(bits));
#else
    Half halves[kWordLanes];
    for (int i = 0; i < kWordLanes; i += count) std::memcpy(halves + i, p, count * sizeof(Half));
    return load(halves);
#endif
}

// A lower and an upper bound are rounded outward where the type is coarser than the numbers that they bound.
template <typename T>
inline void store_lower(T* p, Vec v) {
    store(p, v);
}
template <typename T>
inline void store_upper(T* p, Vec v) {
    store(p, v);
}
template <typename T>
inline void store_nearest(T* p, Vec v) {
    store(p, v);
}
inline void store_lower(Float8E4M3* p, Vec v) { store_bits(p, e4m3_bits(v, Rounding::kDown)); }
inline void store_upper(Float8E4M3* p, Vec v) { store_bits(p, e4m3_bits(v, Rounding::kUp)); }
inline void store_nearest(Float8E4M3* p, Vec v) { store_bits(p, e4m3_bits(v, Rounding::kNearest)); }

// The sum of each of four vectors, every one by the same tree of additions: equal vectors give equal sums.
template <typename Numbers>
inline Vec4 sum4(Numbers a, Numbers b, Numbers c, Numbers d) {
    const Vec4 a4 = fold(a), b4 = fold(b), c4 = fold(c), d4 = fold(d);
#if defined(__x86_64__)
    const Vec4 ab = _mm_unpacklo_ps(a4, b4) + _mm_unpackhi_ps(a4, b4);
    const Vec4 cd = _mm_unpacklo_ps(c4, d4) + _mm_unpackhi_ps(c4, d4);
    return _mm_movelh_ps(ab, cd) + _mm_movehl_ps(cd, ab);
#else
    const Vec4 even = {a4[0] + a4[2], b4[0] + b4[2], c4[0] + c4[2], d4[0] + d4[2]};
    const Vec4 odd = {a4[1] + a4[3], b4[1] + b4[3], c4[1] + c4[3], d4[1] + d4[3]};
    return even + odd;
#endif
}

inline float sum(Vec v) {
    const Vec4 s = fold(v);
    return (s[0] + s[2]) + (s[1] + s[3]);
}

// e^x for x <= 0, within 2 units in the last place; 0 below -87.3, where the result would be subnormal; NaN stays.
inline Vec exp_nonpositive(Vec x) {
    // x = n ln 2 + r, |r| <= ln 2 / 2. Adding 1.5 * 2^23 rounds to an integer, which is then in the low mantissa bits.
    const Vec shifted = fma(x, broadcast(1.44269504f), broadcast(0x1.8p23f));
    const Vec n = shifted - 0x1.8p23f;
    const Vec r = fma(n, broadcast(-1.42860677e-6f), fma(n, broadcast(-0.693145752f), x));  // ln 2 in two parts
    // The Taylor series to r^7: the first term left out is below 2^-27.
    constexpr float kTaylor[] = {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f};
    Vec p = broadcast(1.0f / 5040);
    for (float coefficient : kTaylor) p = fma(p, r, broadcast(coefficient));
    const Vec scaled = reinterpret_cast<Vec>(reinterpret_cast<IntVec>(p) + (reinterpret_cast<IntVec>(shifted) << 23));
    const Vec result = x < -87.3f ? Vec{} : scaled;
    return x == x ? result : x;
}

}  // namespace quest::cpu::QUEST_CPU_ISA
