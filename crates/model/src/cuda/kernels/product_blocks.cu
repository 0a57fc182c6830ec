// Products with weights in blocks, in bf16: integers of BITS bits, with a scale for each 32 of a row (`block_matrix.rs` says what
// lies where). The integers are exact in bf16 and are multiplied as they are; a block's sum is then
// multiplied by its scale in float32, so that no weight is ever rounded.

#if BF16

// 8 neighbours of a row.
template <int BITS> struct IntegersOf;
template <> struct IntegersOf<4> { typedef u32 Words; };
template <> struct IntegersOf<8> { typedef uint2 Words; };

__device__ __forceinline__ void load_integers(u32 &words, const void *from) {
    asm("ld.global.nc.u32 %0, [%1];" : "=r"(words) : "l"(from));
}
__device__ __forceinline__ void load_integers(uint2 &words, const void *from) {
    asm("ld.global.nc.v2.u32 {%0, %1}, [%2];" : "=r"(words.x), "=r"(words.y) : "l"(from));
}

__device__ __forceinline__ u32 add2(u32 a, u32 b) { // pairs of bf16
    u32 sum;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(sum) : "r"(a), "r"(0x3f803f80), "r"(b)); // a * 1 + b
    return sum;
}

// Pairs of bf16. The lower 7 bits of a number from 128 on are its integer in bf16, so 128 is put over an integer, and taken off.
__device__ __forceinline__ uint4 widen_integers(u32 word) { // each with 8 added
    const u32 MASK = 0x000f000f, OVER = 0x43004300, LESS = 0xc308c308; // 128, -136
    return make_uint4(add2(word & MASK | OVER, LESS), add2(word >> 4 & MASK | OVER, LESS),
                      add2(word >> 8 & MASK | OVER, LESS), add2(word >> 12 & MASK | OVER, LESS));
}
__device__ __forceinline__ u32 widen_bytes(u32 word) { // the first and the third
    const u32 OVER = 0x43004300, LESS = 0xc300c300; // of one below 0 the seven bits are 128 more: -256 is taken off, not -128
    return add2(word & 0x007f007f | OVER, word & 0x00800080 | LESS);
}
__device__ __forceinline__ uint4 widen_integers(uint2 words) {
    return make_uint4(widen_bytes(words.x), widen_bytes(words.x >> 8), widen_bytes(words.y), widen_bytes(words.y >> 8));
}

__device__ __forceinline__ float widen_scale(unsigned short scale) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(scale));
    return value;
}

// A matrix: the integers of its rows, then the scales of all rows for the first 32 of k, then those for the next.
template <int BITS> struct Blocks {
    const unsigned char *integers;
    const unsigned short *scales;
    int row_bytes, rows;

    __device__ Blocks(const void *w, int rows, int k)
        : integers(static_cast<const unsigned char *>(w)), row_bytes(k / 8 * BITS), rows(rows) {
        scales = reinterpret_cast<const unsigned short *>(integers + u64(rows) * row_bytes);
    }
};

// A thread's part of a row, as PlainRow. Parts that follow each other share sectors, which the L1 cache keeps for the next one.
template <int BITS> struct BlockRow {
    typedef unsigned char Element;
    typedef BlockRow OfFew;
    struct Loaded {
        typename IntegersOf<BITS>::Words integers;
        unsigned short scale;
    };
    static const bool IS_SCALED = true;
    static const int AHEAD = 8;
    const unsigned char *integers;
    const unsigned short *scales;
    int rows;

    __device__ BlockRow(const Product &a, const void *w, int row, int rows, int t) : rows(rows) {
        Blocks<BITS> blocks(w, rows, a.k);
        integers = blocks.integers + u64(row) * blocks.row_bytes + t * BITS;
        scales = blocks.scales + row;
    }
    __device__ __forceinline__ Loaded load(int k) const {
        Loaded loaded;
        load_integers(loaded.integers, integers + k / 8 * BITS);
        asm("ld.global.nc.u16 %0, [%1];" : "=h"(loaded.scale) : "l"(scales + u64(k / 32) * rows));
        return loaded;
    }
    __device__ __forceinline__ uint4 weights(const Loaded &loaded) const { return widen_integers(loaded.integers); }
    __device__ __forceinline__ float scale(const Loaded &loaded) const { return widen_scale(loaded.scale); }
};

// As PlainTile. The scales of a stage lie behind its integers.
template <int BITS, bool IS_GATED> struct BlockTile {
    typedef unsigned char Element;
    static const int ROW_BYTES = 4 * BITS;
    static const int PIECES = SIDE * ROW_BYTES / 16; // of 16 bytes
    static const int BYTES = SIDE * (ROW_BYTES + 2);
    static const int STAGES = BITS == 4 ? 4 : 3;
    static const int HEADS = 0;
    static const bool IS_SCALED = true;
    const unsigned char *integers, *scales; // this thread's
    u64 apart; // from a piece of the thread to its next, which is of the other half of the rows where there are two
    int rows;

    __device__ BlockTile(const Product &a, const void *w, int o, int k, int thread, uint4 *) : rows(IS_GATED ? a.outputs * 2 : a.outputs) {
        Blocks<BITS> blocks(w, rows, a.k);
        u64 second = IS_GATED ? a.outputs : SIDE / 2; // the first row of the second half, from o
        apart = second * blocks.row_bytes;
        // Of 8 bits a thread has a piece of each half; of 4 there is one for each thread.
        int row = thread * 16 / ROW_BYTES, half = row / (SIDE / 2);
        u64 at = o + half * second + row % (SIDE / 2);
        integers = blocks.integers + at * blocks.row_bytes + k / 8 * BITS + thread * 16 % ROW_BYTES;
        // Eight threads copy eight scales each.
        u64 scale = o + thread / 4 * second + thread % 4 * 8;
        scales = reinterpret_cast<const unsigned char *>(blocks.scales + u64(k / 32) * rows + scale);
    }
    __device__ __forceinline__ void copy(unsigned char *to, int thread) {
        for (int i = 0; i < PIECES / SIDE; ++i) copy_ahead(to + (thread + i * SIDE) * 16, integers + i * apart);
        if (thread < SIDE / 8) copy_ahead(to + SIDE * ROW_BYTES + thread * 16, scales);
        integers += ROW_BYTES, scales += rows * 2;
    }
    __device__ __forceinline__ uint4 weights(const unsigned char *tile, int at, int t) const {
        return widen_integers(*reinterpret_cast<const typename IntegersOf<BITS>::Words *>(tile + at * ROW_BYTES + t * BITS));
    }
    __device__ __forceinline__ float scale(const unsigned char *tile, int at) const {
        return widen_scale(*reinterpret_cast<const unsigned short *>(tile + SIDE * ROW_BYTES + at * 2));
    }
};

// h[row] = table[ids[row]], a block per row
template <int BITS> __device__ __forceinline__ void embed_row(const Embed &a) {
    begin();
    Blocks<BITS> table(a.table, a.rows, a.d);
    u32 id = a.ids[blockIdx.x];
    for (int i = threadIdx.x; i < a.d / 8; i += blockDim.x) {
        typename IntegersOf<BITS>::Words words;
        load_integers(words, table.integers + u64(id) * table.row_bytes + i * BITS);
        uint4 pairs = widen_integers(words);
        float scale = widen_scale(table.scales[u64(i / 4) * a.rows + id]);
        float *to = a.h + u64(blockIdx.x) * a.d + i * 8;
        const u32 own[4] = {pairs.x, pairs.y, pairs.z, pairs.w};
        for (int j = 0; j < 4; ++j) {
            to[2 * j] = __uint_as_float(own[j] << 16) * scale;
            to[2 * j + 1] = __uint_as_float(own[j] & 0xffff0000u) * scale;
        }
    }
}

#define BLOCKS_OF(BITS)                                                                                                \
    template <int KIND> __device__ __forceinline__ void few_blocks##BITS(const Product &a) {                           \
        few_of<KIND, BlockRow<BITS>>(a);                                                                               \
    }                                                                                                                  \
    template <int KIND> __device__ __forceinline__ void many_blocks##BITS(const Product &a) {                          \
        many_of<KIND, BlockTile<BITS, Rows<KIND>::IS_GATED>>(a);                                                       \
    }                                                                                                                  \
    KINDS(few_blocks##BITS, few_blocks##BITS, 128, 1)                                                                  \
    KINDS(many_blocks##BITS, many_blocks##BITS, 4 * SIDE, 2)                                                           \
    extern "C" __global__ void embed_blocks##BITS(Embed a) { embed_row<BITS>(a); }

// For the formats that a model has.
#if BLOCKS4
BLOCKS_OF(4)
#endif
#if BLOCKS8
BLOCKS_OF(8)
#endif

#endif
