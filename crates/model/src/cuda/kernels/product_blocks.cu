// Products with weights in blocks, in bf16 (`block_matrix.rs` says what lies where).
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
struct Line {
    float scale, added;
};

// Formats: bytes of each plane for 32 of a row, SHARED for SHARED_K; whether weights are rounded, and something is added; what is
// taken off integers in 4 to 6 bits. `line` is told what is a row's own and what it shares, and of which 16 of 32.
struct Q4_0 {
    static const int LOW = 16, UPPER = 0, OWN = 2, SHARED = 0, SHARED_K = 32, ZERO = 8;
    static const bool IS_ROUNDED = false, IS_ADDED = false;
    static __device__ __forceinline__ Line line(u32 own, u32, int) { return {widen_half(own), 0}; }
};
struct Q8_0 {
    static const int LOW = 32, UPPER = 0, OWN = 2, SHARED = 0, SHARED_K = 32, ZERO = 0;
    static const bool IS_ROUNDED = false, IS_ADDED = false;
    static __device__ __forceinline__ Line line(u32 own, u32, int) { return {widen_half(own), 0}; }
};
struct Q4_1 {
    static const int LOW = 16, UPPER = 0, OWN = 4, SHARED = 0, SHARED_K = 32, ZERO = 0;
    static const bool IS_ROUNDED = true, IS_ADDED = true;
    static __device__ __forceinline__ Line line(u32 own, u32, int) { return {widen_half(own), widen_half(own >> 16)}; }
};
struct Q5_0 {
    static const int LOW = 16, UPPER = 4, OWN = 2, SHARED = 0, SHARED_K = 32, ZERO = 16;
    static const bool IS_ROUNDED = true, IS_ADDED = false;
    static __device__ __forceinline__ Line line(u32 own, u32, int) { return {widen_half(own), 0}; }
};
struct Q5_1 {
    static const int LOW = 16, UPPER = 4, OWN = 4, SHARED = 0, SHARED_K = 32, ZERO = 0;
    static const bool IS_ROUNDED = true, IS_ADDED = true;
    static __device__ __forceinline__ Line line(u32 own, u32, int) { return {widen_half(own), widen_half(own >> 16)}; }
};
struct Q4_K {
    static const int LOW = 16, UPPER = 0, OWN = 2, SHARED = 4, SHARED_K = 256, ZERO = 0;
    static const bool IS_ROUNDED = true, IS_ADDED = true;
    static __device__ __forceinline__ Line line(u32 own, u32 shared, int) {
        return {widen_half(shared) * widen_byte(own & 0xff), -(widen_half(shared >> 16) * widen_byte(own >> 8))};
    }
};
struct Q5_K : Q4_K {
    static const int UPPER = 4;
};
struct Q6_K {
    static const int LOW = 16, UPPER = 8, OWN = 2, SHARED = 2, SHARED_K = 256, ZERO = 32;
    static const bool IS_ROUNDED = true, IS_ADDED = false;
    static __device__ __forceinline__ Line line(u32 own, u32 shared, int half) {
        return {widen_half(shared) * widen_signed(own >> half * 8 & 0xff), 0};
    }
};
struct F8_E4M3 {
    static const int LOW = 32, UPPER = 0, OWN = 0, SHARED = 4, SHARED_K = 64, ZERO = 0;
    static const bool IS_ROUNDED = true, IS_ADDED = false;
    static __device__ __forceinline__ Line line(u32, u32 shared, int) { return {__uint_as_float(shared), 0}; }
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
__device__ __forceinline__ float2 weight_pair(Words words, u32 upper, int j, Line line) {
    float2 n = Numbers<F>::of(words, upper, j);
    if (F::IS_ADDED) return make_float2(fmaf(n.x, line.scale, line.added), fmaf(n.y, line.scale, line.added));
    return make_float2(n.x * line.scale, n.y * line.scale);
}

// And as they are multiplied.
template <typename F, typename Words>
__device__ __forceinline__ u32 operand_pair(Words words, u32 upper, int j, Line line) {
    if (!F::IS_ROUNDED) return integer_pair<F>(words, upper, j);
    float2 pair_of = weight_pair<F>(words, upper, j, line);
    return pair(pair_of.x, pair_of.y);
}
template <typename F, typename Words> __device__ __forceinline__ uint4 operands(Words words, u32 upper, Line line) {
    upper = spread<F>(upper);
    return make_uint4(operand_pair<F>(words, upper, 0, line), operand_pair<F>(words, upper, 1, line),
                      operand_pair<F>(words, upper, 2, line), operand_pair<F>(words, upper, 3, line));
}

// Where a matrix has what: tiles of rows, of each its columns, plane by plane, then what columns share.
template <typename F> struct Blocks {
    static const int ROWS = 64; // of a tile
    static const int UPPER_AT = ROWS * F::LOW, OWN_AT = UPPER_AT + ROWS * F::UPPER, COLUMN = OWN_AT + ROWS * F::OWN;

    // Bytes of a tile's columns, and of all of it.
    static __device__ __forceinline__ int columns(int k) { return k / 32 * COLUMN; }
    static __device__ __forceinline__ int tile(int k) { return columns(k) + k / F::SHARED_K * (ROWS * F::SHARED); }
};

// A thread's part of a row, as PlainRow.
template <typename F> struct BlockRow {
    typedef BlockRow OfFew;
    struct Loaded {
        typename WordsOf<F::LOW>::Words low;
        u32 upper, own, shared;
    };
    static const bool IS_SCALED = !F::IS_ROUNDED;
    static const int AHEAD = F::IS_ROUNDED ? 6 : 8;
    const unsigned char *tile;
    int low, upper, own, shared, half; // where its bytes are in a column, those that columns share in the tile; which 16 of 32 it is of

    __device__ BlockRow(const void *w, int row, int k, int t)
        : tile(static_cast<const unsigned char *>(w) + u64(row / Blocks<F>::ROWS) * Blocks<F>::tile(k)), half(t / 2) {
        row %= Blocks<F>::ROWS;
        low = row * F::LOW + t * (F::LOW / 4), upper = Blocks<F>::UPPER_AT + row * F::UPPER + t * (F::UPPER / 4);
        own = Blocks<F>::OWN_AT + row * F::OWN, shared = Blocks<F>::columns(k) + row * F::SHARED;
    }
    __device__ BlockRow(const Product &a, const void *w, int row, int, int t) : BlockRow(w, row, a.k, t) {}
    __device__ __forceinline__ Loaded load(int k) const {
        const unsigned char *column = tile + k / 32 * Blocks<F>::COLUMN;
        Loaded loaded;
        load_words(loaded.low, column + low);
        loaded.upper = load_bytes<F::UPPER / 4>(column + upper);
        loaded.own = load_bytes<F::OWN>(column + own);
        loaded.shared = load_bytes<F::SHARED>(tile + shared + k / F::SHARED_K * (Blocks<F>::ROWS * F::SHARED));
        return loaded;
    }
    __device__ __forceinline__ Line line(const Loaded &loaded) const { return F::line(loaded.own, loaded.shared, half); }
    __device__ __forceinline__ uint4 weights(const Loaded &loaded) const {
        return operands<F>(loaded.low, loaded.upper, line(loaded));
    }
    __device__ __forceinline__ float scale(const Loaded &loaded) const { return IS_SCALED ? line(loaded).scale : 1; }
};

// Copies ROWS rows of a plane ahead, by so many threads: two runs of rows, which begin `second` rows apart.
template <typename F, int BYTES, int ROWS, int THREADS> struct PlaneCopy {
    static const int HALF = ROWS / 2 * BYTES / 16; // pieces of 16 bytes
    int from, apart; // the thread's first piece, from the beginning of the matrix, and from there to its second

    // The plane begins at `plane` in a tile, the first run at row o.
    __device__ PlaneCopy(int plane, int o, int second, int k, int thread) {
        if constexpr (BYTES > 0) {
            auto at = [&](int row) { return row / Blocks<F>::ROWS * Blocks<F>::tile(k) + row % Blocks<F>::ROWS * BYTES; };
            from = plane + at(o + thread / HALF * second) + thread % HALF * 16, apart = at(o + second) - at(o);
        }
    }
    __device__ __forceinline__ void copy(unsigned char *to, const unsigned char *w, int thread) const {
        if constexpr (BYTES > 0) {
            static_assert(HALF <= THREADS, "a thread has a piece of each half, or of one");
            if (2 * HALF < THREADS && thread >= 2 * HALF) return;
            copy_ahead(to + thread * 16, w + from);
            if (2 * HALF > THREADS) copy_ahead(to + (thread + THREADS) * 16, w + from + apart);
        }
    }
};

// Columns of so many rows, one after another, and what they share.
template <typename F, int ROWS, int THREADS> struct ColumnCopy {
    static const int UPPER_AT = ROWS * F::LOW, OWN_AT = UPPER_AT + ROWS * F::UPPER, BYTES = OWN_AT + ROWS * F::OWN;
    PlaneCopy<F, F::LOW, ROWS, THREADS> low;
    PlaneCopy<F, F::UPPER, ROWS, THREADS> upper;
    PlaneCopy<F, F::OWN, ROWS, THREADS> own;
    PlaneCopy<F, F::SHARED, ROWS, THREADS> shared;
    const unsigned char *w, *column; // the matrix, and where in it tile 0 has the next column
    int k;

    // From column `first` / 32 on.
    __device__ ColumnCopy(const void *matrix, int o, int second, int k, int first, int thread)
        : low(0, o, second, k, thread), upper(Blocks<F>::UPPER_AT, o, second, k, thread),
          own(Blocks<F>::OWN_AT, o, second, k, thread), shared(Blocks<F>::columns(k), o, second, k, thread),
          w(static_cast<const unsigned char *>(matrix)), column(w + first / 32 * Blocks<F>::COLUMN), k(first) {}
    // The next one.
    __device__ __forceinline__ void next(unsigned char *to, int thread) {
        low.copy(to, column, thread), upper.copy(to + UPPER_AT, column, thread), own.copy(to + OWN_AT, column, thread);
        column += Blocks<F>::COLUMN, k += 32;
    }
    // What the next one shares.
    __device__ __forceinline__ void next_shared(unsigned char *to, int thread) const {
        shared.copy(to, w + k / F::SHARED_K * (Blocks<F>::ROWS * F::SHARED), thread);
    }
};

// As PlainTile. A stage is a column, plane by plane, then what is shared.
template <typename F, bool IS_GATED> struct BlockTile {
    typedef ColumnCopy<F, SIDE, SIDE> Copy;
    static const int BYTES = Copy::BYTES + SIDE * F::SHARED;
    static const int STAGES = F::LOW == 16 ? 4 : 3;
    static const int HEADS = 0;
    static const bool IS_SCALED = !F::IS_ROUNDED;
    Copy ahead;

    __device__ BlockTile(const Product &a, const void *w, int o, int k, int thread, uint4 *)
        : ahead(w, o, IS_GATED ? a.outputs : SIDE / 2, a.k, k, thread) {}
    __device__ __forceinline__ void copy(unsigned char *to, int thread) {
        ahead.next_shared(to + Copy::BYTES, thread);
        ahead.next(to, thread);
    }
    __device__ __forceinline__ Line line(const unsigned char *tile, int at, int t) const {
        u32 own = take_bytes<F::OWN>(tile + Copy::OWN_AT + at * F::OWN);
        return F::line(own, take_bytes<F::SHARED>(tile + Copy::BYTES + at * F::SHARED), t / 2);
    }
    __device__ __forceinline__ uint4 weights(const unsigned char *tile, int at, int t) const {
        typedef typename WordsOf<F::LOW>::Words Words;
        Words low = *reinterpret_cast<const Words *>(tile + at * F::LOW + t * (F::LOW / 4));
        u32 upper = take_bytes<F::UPPER / 4>(tile + Copy::UPPER_AT + at * F::UPPER + t * (F::UPPER / 4));
        return operands<F>(low, upper, line(tile, at, t));
    }
    __device__ __forceinline__ float scale(const unsigned char *tile, int at) const { return IS_SCALED ? line(tile, at, 0).scale : 1; }
};

// h[row] = table[ids[row]], a block per row
extern "C" __global__ void embed_rows(Embed a) {
    typedef FORMAT F;
    begin();
    int t = threadIdx.x % 4;
    BlockRow<F> table(a.table, a.ids[blockIdx.x], a.d, t);
    for (int k = threadIdx.x / 4 * 32; k < a.d; k += blockDim.x * 8) {
        typename BlockRow<F>::Loaded loaded = table.load(k);
        Line line = table.line(loaded);
        u32 upper = spread<F>(loaded.upper);
        float *to = a.h + u64(blockIdx.x) * a.d + k + t * 8;
        for (int j = 0; j < 4; ++j) {
            float2 two = weight_pair<F>(loaded.low, upper, j, line);
            to[2 * j] = two.x, to[2 * j + 1] = two.y;
        }
    }
}

#endif
