// Attention of T5: softmax(q K^T + bias) V, without a scale. A block makes some queries of one head of one sequence; the
// ways to do that follow in attention_*.cu. Sums over keys go in tiles of 32 from key 0 on, so they depend on no other
// sequence, and a tile of which a query sees nothing changes no bit of it.

// A sequence of a batch.
struct Sequence {
    T *cache;           // the decoder's: (blocks, capacity, 2 * inner)
    const T *cross;     // keys and values of its input in block 0: (input_rows, 2 * inner)
    u64 cross_stride;   // from one block's to the next, in elements
    int capacity;
    int input_rows;
    int first_row; // of its rows in the batch
    int rows;
    int position; // of its first row
    int unused;
};

struct Attention {
    const T *q;   // (rows, q_stride); of an encoder keys and values follow the query in the same row
    T *out;       // (rows, inner)
    const Sequence *sequences;
    const float *bias; // (heads, 2 * reach + 1)
    int q_stride;
    int inner;
    int reach;
    int block;
    int layers;
    const Pass *pass;
};

enum Keys { OWN_ROWS, CACHE, INPUT };

// The keys and values that the queries of a block see.
template <int KEYS> struct Seen {
    const T *keys; // of the block's head; values lie `inner` behind
    u64 stride;
    int end;
    int first; // query of the block

    __device__ Seen(const Attention &a, const Sequence &s, int queries) : first(blockIdx.z * queries) {
        keys = KEYS == OWN_ROWS ? a.q + u64(s.first_row) * a.q_stride + a.inner
               : KEYS == CACHE  ? s.cache + u64(a.block) * s.capacity * 2 * a.inner
                                : s.cross + u64(a.block) * s.cross_stride;
        keys += blockIdx.x * D_KV;
        stride = KEYS == OWN_ROWS ? a.q_stride : 2 * a.inner;
        end = KEYS == OWN_ROWS ? s.rows : KEYS == CACHE ? s.position + s.rows : s.input_rows;
        if (KEYS == CACHE) end = min(end, s.position + first + queries);
    }
};

// The score of a key for a query, bias added; -infinity where it is not seen.
template <int KEYS>
__device__ __forceinline__ float biased(float score, const float *bias, int reach, int key, int position, int end) {
    if (key >= end || (KEYS == CACHE && key > position)) return -INFINITY;
    return KEYS == INPUT ? score : score + bias[max(-reach, min(reach, key - position))];
}

// Puts the keys and values of a sequence's new rows into its cache: a block per sequence and row of it.
extern "C" __global__ void write_cache(Attention a) {
    begin();
    if (ended(a.pass, a.layers)) return;
    Sequence s = a.sequences[blockIdx.x];
    for (int r = blockIdx.y; r < s.rows; r += gridDim.y) {
        const T *from = a.q + u64(s.first_row + r) * a.q_stride + a.inner;
        T *to = s.cache + (u64(a.block) * s.capacity + s.position + r) * 2 * a.inner;
        for (int i = threadIdx.x; i < 2 * a.inner; i += blockDim.x) to[i] = from[i];
    }
}
