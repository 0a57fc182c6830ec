// Weights in blocks, each format's, as products in bf16 multiply them: eight neighbours of a row out of their bits and scales
// (`block_matrix.rs` says what lies where).
//
// The integers of Q4_0 and Q8_0 are exact in bf16 and multiplied as they are; a block's sum is then multiplied by its scale in
// float32, so that no weight is ever rounded. Weights of the other formats are widened to float32, as the processor does it, and
// rounded to bf16 once: results have the bits that these weights have in bf16.

#if BF16

__device__ __forceinline__ u32 add2(u32 a, u32 b) { // pairs of bf16
    u32 sum;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(sum) : "r"(a), "r"(0x3f803f80), "r"(b)); // a * 1 + b
    return sum;
}

__device__ __forceinline__ float widen_half(u32 half) { // the lower 16 bits
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"((unsigned short)half));
    return value;
}

// A byte as float, without the slower instruction for that: the lowest 23 bits of a number from 2^23 on are its integer.
__device__ __forceinline__ float widen_byte(u32 byte) { return __uint_as_float(0x4b000000 | byte) - 8388608.f; }
__device__ __forceinline__ float widen_signed(u32 byte) { return __uint_as_float(0x4b000000 | byte ^ 0x80) - 8388736.f; }

// A weight is its integer times `scale`, and what is `added`.
struct Affine {
    float scale, added;
};

// Formats: bytes of each plane for 32 of a row, SHARED for SHARED_K; whether weights are rounded, and something is added; what is
// taken off integers in 4 to 6 bits. `affine` is told what is a row's own and what it shares, and of which 16 of 32.
struct Q4_0 {
    static const int LOW = 16, UPPER = 0, OWN = 2, SHARED = 0, SHARED_K = 32, ZERO = 8;
    static const bool IS_ROUNDED = false, IS_ADDED = false;
    static __device__ __forceinline__ Affine affine(u32 own, u32, int) { return {widen_half(own), 0}; }
};
struct Q8_0 : Q4_0 {
    static const int LOW = 32, ZERO = 0;
};
struct Q5_0 : Q4_0 {
    static const int UPPER = 4, ZERO = 16;
    static const bool IS_ROUNDED = true;
};
struct Q4_1 {
    static const int LOW = 16, UPPER = 0, OWN = 4, SHARED = 0, SHARED_K = 32, ZERO = 0;
    static const bool IS_ROUNDED = true, IS_ADDED = true;
    static __device__ __forceinline__ Affine affine(u32 own, u32, int) { return {widen_half(own), widen_half(own >> 16)}; }
};
struct Q5_1 : Q4_1 {
    static const int UPPER = 4;
};
struct Q4_K {
    static const int LOW = 16, UPPER = 0, OWN = 2, SHARED = 4, SHARED_K = 256, ZERO = 0;
    static const bool IS_ROUNDED = true, IS_ADDED = true;
    static __device__ __forceinline__ Affine affine(u32 own, u32 shared, int) {
        return {widen_half(shared) * widen_byte(own & 0xff), -(widen_half(shared >> 16) * widen_byte(own >> 8))};
    }
};
struct Q5_K : Q4_K {
    static const int UPPER = 4;
};
struct Q6_K {
    static const int LOW = 16, UPPER = 8, OWN = 2, SHARED = 2, SHARED_K = 256, ZERO = 32;
    static const bool IS_ROUNDED = true, IS_ADDED = false;
    static __device__ __forceinline__ Affine affine(u32 own, u32 shared, int half) {
        return {widen_half(shared) * widen_signed(own >> half * 8 & 0xff), 0};
    }
};
struct F8_E4M3 {
    static const int LOW = 32, UPPER = 0, OWN = 0, SHARED = 4, SHARED_K = 64, ZERO = 0;
    static const bool IS_ROUNDED = true, IS_ADDED = false;
    static __device__ __forceinline__ Affine affine(u32, u32 shared, int) { return {__uint_as_float(shared), 0}; }
};

// The low bits of eight neighbours.
template <int LOW> struct WordsOf { typedef u32 Words; };
template <> struct WordsOf<32> { typedef uint2 Words; };

__device__ __forceinline__ void load_words(u32 &words, const void *from) {
    asm("ld.global.nc.u32 %0, [%1];" : "=r"(words) : "l"(from));
}
__device__ __forceinline__ void load_words(uint2 &words, const void *from) {
    asm("ld.global.nc.v2.u32 {%0, %1}, [%2];" : "=r"(words.x), "=r"(words.y) : "l"(from));
}

// Few bytes, from where nobody writes.
template <int BYTES> __device__ __forceinline__ u32 load_bytes(const unsigned char *from) {
    u32 value = 0;
    if (BYTES == 1) asm("ld.global.nc.u8 %0, [%1];" : "=r"(value) : "l"(from));
    if (BYTES == 2) asm("ld.global.nc.u16 %0, [%1];" : "=r"(value) : "l"(from));
    if (BYTES == 4) asm("ld.global.nc.u32 %0, [%1];" : "=r"(value) : "l"(from));
    return value;
}
template <int BYTES> __device__ __forceinline__ u32 take_bytes(const unsigned char *from) { // from shared memory
    if (BYTES == 1) return *from;
    if (BYTES == 2) return *reinterpret_cast<const unsigned short *>(from);
    if (BYTES == 4) return *reinterpret_cast<const u32 *>(from);
    return 0;
}

// The upper bits of eight neighbours, spread so that those of pair j, moved down by j times their number, are where integers have
// them.
template <typename F> __device__ __forceinline__ u32 spread(u32 upper) {
    if (F::UPPER == 4) return ((upper | upper << 12) & 0x000f000f) << 4;
    if (F::UPPER == 8) return ((upper | upper << 8) & 0x00ff00ff) << 4;
    return 0;
}

// Pair j of eight neighbours as bf16. The lower 7 bits of a number from 128 on are its integer in bf16, so 128 is put over an
// integer, and taken off.
template <typename F> __device__ __forceinline__ u32 integer_pair(u32 word, u32 upper, int j) {
    const u32 LESS = 0xc300 + F::ZERO, MASK = F::UPPER == 4 ? 0x00100010 : 0x00300030;
    u32 pair = word >> 4 * j & 0x000f000f;
    if (F::UPPER) pair |= upper >> F::UPPER / 4 * j & MASK;
    return add2(pair | 0x43004300, LESS | LESS << 16);
}
template <typename F> __device__ __forceinline__ u32 integer_pair(uint2 words, u32, int j) {
    u32 word = (j < 2 ? words.x : words.y) >> j % 2 * 8;
    const u32 OVER = 0x43004300, LESS = 0xc300c300; // of one below 0 the seven bits are 128 more: -256 is taken off, not -128
    return add2(word & 0x007f007f | OVER, word & 0x00800080 | LESS);
}

// The same as float; of FP8 its numbers.
template <typename F> struct Numbers {
    template <typename Words> static __device__ __forceinline__ float2 of(Words words, u32 upper, int j) {
        u32 pair = integer_pair<F>(words, upper, j);
        return make_float2(__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000));
    }
};
template <> struct Numbers<F8_E4M3> {
    static __device__ __forceinline__ float2 of(uint2 words, u32, int j) {
        u32 word = (j < 2 ? words.x : words.y) >> j % 2 * 8;
        u32 first = word << 24 & 0x80000000 | word << 20 & 0x07f00000, second = word << 8 & 0x80000000 | word << 4 & 0x07f00000;
        const float EXPONENTS = __uint_as_float((127 + 120) << 23); // they count from 7, not from 127
        return make_float2(__uint_as_float(first) * EXPONENTS, __uint_as_float(second) * EXPONENTS);
    }
};

// Pair j of eight neighbours as weights.
template <typename F, typename Words>
__device__ __forceinline__ float2 weight_pair(Words words, u32 upper, int j, Affine affine) {
    float2 n = Numbers<F>::of(words, upper, j);
    if (F::IS_ADDED) return make_float2(fmaf(n.x, affine.scale, affine.added), fmaf(n.y, affine.scale, affine.added));
    return make_float2(n.x * affine.scale, n.y * affine.scale);
}

// And as they are multiplied.
template <typename F, typename Words>
__device__ __forceinline__ u32 operand_pair(Words words, u32 upper, int j, Affine affine) {
    if (!F::IS_ROUNDED) return integer_pair<F>(words, upper, j);
    float2 pair_of = weight_pair<F>(words, upper, j, affine);
    return pair(pair_of.x, pair_of.y);
}
template <typename F, typename Words> __device__ __forceinline__ uint4 operands(Words words, u32 upper, Affine affine) {
    upper = spread<F>(upper);
    return make_uint4(operand_pair<F>(words, upper, 0, affine), operand_pair<F>(words, upper, 1, affine),
                      operand_pair<F>(words, upper, 2, affine), operand_pair<F>(words, upper, 3, affine));
}

#endif
