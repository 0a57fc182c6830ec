// Products with weights in blocks: experts in bf16 whose matrices are integers of 4 or 8 bits, with a scale for each 32 of a row
// (`block_matrix.rs` says what lies where). The integers are exact in bf16 and are multiplied as they are; a block's sum is then
// multiplied by its scale in float32, so that no weight is ever rounded.

#if BF16 && BLOCK_BITS

// 8 neighbours of a row.
#if BLOCK_BITS == 4
typedef u32 Integers;
#else
typedef uint2 Integers;
#endif

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

// A matrix in slots: the integers of its rows, then the scales of all rows for the first 32 of k, then those for the next.
struct Blocks {
    const unsigned char *integers;
    const unsigned short *scales;
    int row_bytes, rows;

    __device__ Blocks(const Product &a, const void *w, int rows)
        : integers(static_cast<const unsigned char *>(w)), row_bytes(a.k / 8 * BLOCK_BITS), rows(rows) {
        scales = reinterpret_cast<const unsigned short *>(integers + u64(rows) * row_bytes);
    }
};

// A thread's part of a row, as PlainRow. Parts that follow each other share sectors, which the L1 cache keeps for the next one.
struct BlockRow {
    typedef unsigned char Element;
    typedef BlockRow OfFew;
    struct Loaded {
        Integers integers;
        unsigned short scale;
    };
    static const bool IS_SCALED = true;
    static const int AHEAD = 8;
    const unsigned char *integers;
    const unsigned short *scales;
    int rows;

    __device__ BlockRow(const Product &a, const void *w, int row, int rows, int t) : rows(rows) {
        Blocks blocks(a, w, rows);
        integers = blocks.integers + u64(row) * blocks.row_bytes + t * BLOCK_BITS;
        scales = blocks.scales + row;
    }
    __device__ __forceinline__ Loaded load(int k) const {
        Loaded loaded;
        const unsigned char *from = integers + k / 8 * BLOCK_BITS;
#if BLOCK_BITS == 4
        asm("ld.global.nc.u32 %0, [%1];" : "=r"(loaded.integers) : "l"(from));
#else
        asm("ld.global.nc.v2.u32 {%0, %1}, [%2];" : "=r"(loaded.integers.x), "=r"(loaded.integers.y) : "l"(from));
#endif
        asm("ld.global.nc.u16 %0, [%1];" : "=h"(loaded.scale) : "l"(scales + u64(k / 32) * rows));
        return loaded;
    }
    __device__ __forceinline__ uint4 weights(const Loaded &loaded) const { return widen_integers(loaded.integers); }
    __device__ __forceinline__ float scale(const Loaded &loaded) const { return widen_scale(loaded.scale); }
};

template <int KIND> __device__ __forceinline__ void few_blocks(const Product &a) { few_of<KIND, BlockRow>(a); }

EXPERT_KINDS(few_blocks, few_blocks, 128, 1)
KIND_OF(few_blocks_gather_gate, few_blocks, GATHER_GATE, 128, 1)

// As PlainTile. The scales of a stage lie behind its integers.
template <bool IS_GATED> struct BlockTile {
    typedef unsigned char Element;
    static const int ROW_BYTES = 4 * BLOCK_BITS;
    static const int PIECES = SIDE * ROW_BYTES / 16; // of 16 bytes
    static const int BYTES = SIDE * (ROW_BYTES + 2);
    static const int STAGES = BLOCK_BITS == 4 ? 4 : 3;
    static const int HEADS = 0;
    static const bool IS_SCALED = true;
    const unsigned char *integers, *scales; // this thread's
    u64 apart; // from a piece of the thread to its next, which is of the other half of the rows where there are two
    int rows;

    __device__ BlockTile(const Product &a, const void *w, int o, int k, int thread, uint4 *) : rows(IS_GATED ? a.outputs * 2 : a.outputs) {
        Blocks blocks(a, w, rows);
        u64 second = IS_GATED ? a.outputs : SIDE / 2; // the first row of the second half, from o
        apart = second * blocks.row_bytes;
        // Of 8 bits a thread has a piece of each half; of 4 there is one for each thread.
        int row = thread * 16 / ROW_BYTES, half = row / (SIDE / 2);
        u64 at = o + half * second + row % (SIDE / 2);
        integers = blocks.integers + at * blocks.row_bytes + k / 8 * BLOCK_BITS + thread * 16 % ROW_BYTES;
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
        return widen_integers(*reinterpret_cast<const Integers *>(tile + at * ROW_BYTES + t * BLOCK_BITS));
    }
    __device__ __forceinline__ float scale(const unsigned char *tile, int at) const {
        return widen_scale(*reinterpret_cast<const unsigned short *>(tile + SIDE * ROW_BYTES + at * 2));
    }
};

template <int KIND> __device__ __forceinline__ void many_blocks(const Product &a) {
    many_of<KIND, BlockTile<Rows<KIND>::IS_GATED>>(a);
}

EXPERT_KINDS(many_blocks, many_blocks, 4 * SIDE, 2)
KIND_OF(many_blocks_gather_gate, many_blocks, GATHER_GATE, 4 * SIDE, 2)

#endif
