// Weights in blocks for the products of many rows on Hopper, as WidePlain of product_wide.cu.

#if BF16 && WIDE

// Stages of two columns each, then what they share.
template <typename F> struct WideBlocks {
    typedef ColumnCopy<F, WIDE_SIDE, COPIERS> Column;
    static const int SHARED_AT = 2 * Column::BYTES, BYTES = (SHARED_AT + WIDE_SIDE * F::SHARED + 1023) / 1024 * 1024;
    static const int STAGES = 8;
    static const bool IS_SCALED = !F::IS_ROUNDED;
    struct Copy {
        Column ahead;
        int thread;

        __device__ Copy(const Product &a, const void *w, int o, u64 second, int, int thread)
            : ahead(w, o, int(second), a.k, 0, thread), thread(thread) {}
        __device__ __forceinline__ void next(unsigned char *stage) {
            ahead.next_shared(stage + SHARED_AT, thread);
            ahead.next(stage, thread);
            ahead.next(stage + Column::BYTES, thread);
        }
    };
    // Of a row in a block of a stage, and of which 16 of 32.
    static __device__ __forceinline__ Affine affine(const unsigned char *stage, int block, int row, int half) {
        const unsigned char *own = stage + block * Column::BYTES + Column::OWN_AT + row * F::OWN;
        return F::affine(take_bytes<F::OWN>(own), take_bytes<F::SHARED>(stage + SHARED_AT + row * F::SHARED), half);
    }
    static __device__ __forceinline__ void weights(const unsigned char *stage, int block, u32 (&w)[2][4]) {
        typedef typename WordsOf<F::LOW>::Words Words;
        const unsigned char *column = stage + block * Column::BYTES;
        int first = threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            // Of eight weights a thread takes the first or the second pair of either half.
            int row = first + i % 2 * 8, eight = t / 2 + i / 2 * 2;
            Words low = *reinterpret_cast<const Words *>(column + row * F::LOW + eight * (F::LOW / 4));
            u32 upper = spread<F>(take_bytes<F::UPPER / 4>(column + Column::UPPER_AT + row * F::UPPER + eight * (F::UPPER / 4)));
            Affine own = affine(stage, block, row, i / 2);
            w[0][i] = operand_pair<F>(low, upper, t % 2, own), w[1][i] = operand_pair<F>(low, upper, t % 2 + 2, own);
        }
    }
    // Of the thread's first row, or the one 8 further on.
    static __device__ __forceinline__ float scale(const unsigned char *stage, int block, int further) {
        return IS_SCALED ? affine(stage, block, threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4 + further, 0).scale : 1;
    }
};

#endif
