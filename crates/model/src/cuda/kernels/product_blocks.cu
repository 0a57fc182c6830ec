// Products with weights in blocks, in bf16: where a matrix has what, and how each way to multiply takes it. What weights come to is in
// block_formats.cu.

#if BF16

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
    __device__ __forceinline__ Affine affine(const Loaded &loaded) const { return F::affine(loaded.own, loaded.shared, half); }
    __device__ __forceinline__ uint4 weights(const Loaded &loaded) const {
        return operands<F>(loaded.low, loaded.upper, affine(loaded));
    }
    __device__ __forceinline__ float scale(const Loaded &loaded) const { return IS_SCALED ? affine(loaded).scale : 1; }
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
    __device__ __forceinline__ Affine affine(const unsigned char *tile, int at, int t) const {
        u32 own = take_bytes<F::OWN>(tile + Copy::OWN_AT + at * F::OWN);
        return F::affine(own, take_bytes<F::SHARED>(tile + Copy::BYTES + at * F::SHARED), t / 2);
    }
    __device__ __forceinline__ uint4 weights(const unsigned char *tile, int at, int t) const {
        typedef typename WordsOf<F::LOW>::Words Words;
        Words low = *reinterpret_cast<const Words *>(tile + at * F::LOW + t * (F::LOW / 4));
        u32 upper = take_bytes<F::UPPER / 4>(tile + Copy::UPPER_AT + at * F::UPPER + t * (F::UPPER / 4));
        return operands<F>(low, upper, affine(tile, at, t));
    }
    __device__ __forceinline__ float scale(const unsigned char *tile, int at) const { return IS_SCALED ? affine(tile, at, 0).scale : 1; }
};

// h[row] = table[ids[row]], a block per row
extern "C" __global__ void embed_rows(Embed a) {
    typedef FORMAT F;
    begin();
    int t = threadIdx.x % 4;
    BlockRow<F> table(a.table, a.ids[blockIdx.x], a.d, t);
    for (int k = threadIdx.x / 4 * 32; k < a.d; k += blockDim.x * 8) {
        typename BlockRow<F>::Loaded loaded = table.load(k);
        Affine affine = table.affine(loaded);
        u32 upper = spread<F>(loaded.upper);
        float *to = a.h + u64(blockIdx.x) * a.d + k + t * 8;
        for (int j = 0; j < 4; ++j) {
            float2 two = weight_pair<F>(loaded.low, upper, j, affine);
            to[2 * j] = two.x, to[2 * j + 1] = two.y;
        }
    }
}

#endif
