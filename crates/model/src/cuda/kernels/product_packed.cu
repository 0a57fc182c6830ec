// Products with packed weights: experts in bf16 (`packed.rs` says what lies where). They are unpacked in registers, so the sums
// have the terms and the order of product_tensor.cu, and its bits.

#if BF16

// Signs and upper bits of the exponents of a pair of weights.
__device__ __forceinline__ u32 upper(u32 word, u32 turn) { return __funnelshift_r(word, word, turn) & 0x87008700; }

// Puts exceptions and zeros into 8 weights. `none` has a bit for each half byte of the word whose exponent's upper bits are 0;
// `beyond` are the exceptions that no head has room for.
__device__ __forceinline__ uint4 mend(uint4 pairs, u32 none, uint4 head, const unsigned short *beyond, uint2 bytes, u32 word) {
    do {
        // Half byte 2 is of weight 0, 3 of weight 2; 6 of weight 1.
        u32 half = (__ffs(none) / 4 + 6) % 8, pair = half % 4, shift = half / 4 * 16;
        none &= none - 1;
        u32 number = __byte_perm(bytes.x, bytes.y, pair * 2 + half / 4) & 0xff;
        u32 value = upper(word, pair * 4) >> shift & 0x8000;
        if (number > 4) value = beyond[head.y + number - 5];
        else if (number) value = (number < 3 ? head.z : head.w) >> (number - 1) % 2 * 16 & 0xffff;
        u32 keep = ~(0xffffu << shift), put = value << shift;
        if (pair == 0) pairs.x = pairs.x & keep | put;
        if (pair == 1) pairs.y = pairs.y & keep | put;
        if (pair == 2) pairs.z = pairs.z & keep | put;
        if (pair == 3) pairs.w = pairs.w & keep | put;
    } while (none);
    return pairs;
}

// The same out of the way of what is mostly done: at few rows a kernel must be short.
__device__ __noinline__ uint4 mend_apart(uint4 pairs, u32 none, uint4 head, const unsigned short *beyond, uint2 bytes, u32 word) {
    return mend(pairs, none, head, beyond, bytes, word);
}

// A matrix in slots: its rows' heads, then the rows, then the exceptions that no head has room for.
struct Packed {
    const unsigned char *heads;
    int outputs, row_bytes;

    __device__ Packed(const Product &a, const void *w)
        : heads(static_cast<const unsigned char *>(w)), outputs(a.outputs), row_bytes(a.k / 2 * 3) {}

    __device__ const uint4 &head(int o) const { return reinterpret_cast<const uint4 *>(heads)[o]; }

    __device__ const unsigned char *row(int o) const { return heads + outputs * 16 + u64(o) * row_bytes; }

    // 8 neighbours of the row with this head.
    template <bool APART> __device__ __forceinline__ uint4 unpack(const uint4 &head, uint2 bytes, u32 word) const {
        uint4 pairs = make_uint4(__byte_perm(bytes.x, 0, 0x4140) + upper(word, 0) + head.x,
                                 __byte_perm(bytes.x, 0, 0x4342) + upper(word, 4) + head.x,
                                 __byte_perm(bytes.y, 0, 0x4140) + upper(word, 8) + head.x,
                                 __byte_perm(bytes.y, 0, 0x4342) + upper(word, 12) + head.x);
        // Every half byte of the word holds one exponent's upper bits, and somebody's sign.
        u32 none = ~(word | word >> 1 | word >> 2) & 0x11111111;
        if (!none) return pairs;
        const unsigned short *beyond = reinterpret_cast<const unsigned short *>(row(outputs));
        return APART ? mend_apart(pairs, none, head, beyond, bytes, word) : mend(pairs, none, head, beyond, bytes, word);
    }
};

// A thread's part of a row, as PlainRow. Parts that follow each other share sectors, which the L1 cache keeps for the next one, but
// not where ONCE is set: steps of generation, a few rows through many kernels that follow closely, are 14% slower if it does.
template <bool ONCE> struct PackedRow {
    typedef PackedRow<true> OfFew;
    static const bool IS_SCALED = false;
    static const int AHEAD = 6;
    struct Loaded {
        uint2 bytes;
        u32 word;
    };
    Packed w;
    uint4 head;
    const unsigned char *bytes, *words;

    __device__ PackedRow(const Product &a, const void *matrix, int row, int, int t)
        : w(a, matrix), head(w.head(row)), bytes(w.row(row) + t * 8), words(w.row(row) + 32 + t * 4) {}
    __device__ __forceinline__ Loaded load(int k) const {
        Loaded loaded;
        const unsigned char *from = bytes + k / 32 * 48, *word = words + k / 32 * 48;
        if (ONCE) {
            asm("ld.global.nc.L1::no_allocate.v2.u32 {%0, %1}, [%2];" : "=r"(loaded.bytes.x), "=r"(loaded.bytes.y) : "l"(from));
            asm("ld.global.nc.L1::no_allocate.u32 %0, [%1];" : "=r"(loaded.word) : "l"(word));
        } else {
            asm("ld.global.nc.v2.u32 {%0, %1}, [%2];" : "=r"(loaded.bytes.x), "=r"(loaded.bytes.y) : "l"(from));
            asm("ld.global.nc.u32 %0, [%1];" : "=r"(loaded.word) : "l"(word));
        }
        return loaded;
    }
    __device__ __forceinline__ uint4 weights(const Loaded &loaded) const {
        return w.unpack<true>(head, loaded.bytes, loaded.word);
    }
    __device__ __forceinline__ float scale(const Loaded &) const { return 1; }
};

template <int KIND> __device__ __forceinline__ void few_packed(const Product &a) { few_of<KIND, PackedRow<false>>(a); }

EXPERT_KINDS(few_packed, few_packed, 128, 1)

// As PlainTile; the heads of its rows are in shared memory, too.
struct PackedTile {
    static const int BYTES = SIDE * 48;
    static const int STAGES = 3;
    static const int HEADS = SIDE;
    static const bool IS_SCALED = false;
    Packed w;
    const unsigned char *from;
    const uint4 *heads;
    u32 pieces[3]; // 16 bytes each, 3 of a row

    __device__ PackedTile(const Product &a, const void *matrix, int o, int k, int thread, uint4 *heads)
        : w(a, matrix), from(w.row(o) + k / 32 * 48), heads(heads) {
        if (threadIdx.x < SIDE) heads[threadIdx.x] = w.head(o + threadIdx.x);
        for (int i = 0; i < 3; ++i) pieces[i] = (thread + i * SIDE) / 3 * w.row_bytes + (thread + i * SIDE) % 3 * 16;
        __syncthreads();
    }
    __device__ __forceinline__ void copy(unsigned char *to, int thread) {
        for (int i = 0; i < 3; ++i) copy_ahead(to + (thread + i * SIDE) * 16, from + pieces[i]);
        from += 48;
    }
    __device__ __forceinline__ uint4 weights(const unsigned char *tile, int at, int t) const {
        uint2 bytes = *reinterpret_cast<const uint2 *>(tile + at * 48 + t * 8);
        u32 word = *reinterpret_cast<const u32 *>(tile + at * 48 + 32 + t * 4);
        return w.unpack<false>(heads[at], bytes, word);
    }
    __device__ __forceinline__ float scale(const unsigned char *, int) const { return 1; }
};

template <int KIND> __device__ __forceinline__ void many_packed(const Product &a) { many_of<KIND, PackedTile>(a); }

EXPERT_KINDS(many_packed, many_packed, 4 * SIDE, 2)

#endif
