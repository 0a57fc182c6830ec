// softmax(scale * q K^T + bias) V. A block makes some queries of one head of one sequence; the ways to do that follow in
// attention_*.cu. Sums over keys go in tiles of 32 whose first keys are multiples of that, so they depend on no other sequence,
// and a tile of which a query sees nothing changes no bit of it. In bf16 those of a cache go in runs of RUN keys, each summed by
// itself and then added in order, so that the runs of a long cache can be many blocks' (attention_steps.cu).

// A sequence of a batch.
struct Sequence {
    T *cache;           // the decoder's: (blocks, capacity, 2 * kv_inner)
    const T *cross;     // keys and values of its input in block 0: (input_rows, 2 * kv_inner)
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
    const float *bias; // (heads, 2 * reach + 1); null: none
    int q_stride;
    int inner;
    int kv_inner;
    int group; // heads of queries that share one of keys and values
    float scale;
    int window; // how many keys back a query sees, itself among them
    int reach;
    int block;
    int layers;
    const Pass *pass;
    float *parts; // of steps: what each run of keys made, for each row and head; null: one block takes all runs
    int runs;     // at most
};

enum Keys { OWN_ROWS, CACHE, INPUT };

// The keys and values that the queries of a block see.
template <int KEYS> struct Seen {
    const T *keys; // of the block's head; values lie `kv_inner` behind
    u64 stride;
    int begin; // a multiple of 32
    int end;
    int first; // query of the block

    // The last queries come first: they see most, and would else be waited for at the end.
    __device__ Seen(const Attention &a, const Sequence &s, int queries) : first((gridDim.z - 1 - blockIdx.z) * queries) {
        keys = KEYS == OWN_ROWS ? a.q + u64(s.first_row) * a.q_stride + a.inner
               : KEYS == CACHE  ? s.cache + u64(a.block) * s.capacity * 2 * a.kv_inner
                                : s.cross + u64(a.block) * s.cross_stride;
        keys += blockIdx.x / a.group * D_KV;
        stride = KEYS == OWN_ROWS ? a.q_stride : 2 * a.kv_inner;
        begin = KEYS == CACHE ? max(0, s.position + first - a.window + 1) / 32 * 32 : 0;
        end = KEYS == OWN_ROWS ? s.rows : KEYS == CACHE ? s.position + s.rows : s.input_rows;
        if (KEYS == CACHE) end = min(end, s.position + first + queries);
    }
};

// The score of a key for a query, scaled and bias added; -infinity where it is not seen. `bias` is of distance 0.
template <int KEYS>
__device__ __forceinline__ float biased(float score, const Attention &a, const float *bias, int key, int position, int end) {
    if (key >= end || (KEYS == CACHE && (key > position || position - key >= a.window))) return -INFINITY;
    score *= a.scale;
    return KEYS == INPUT || !a.bias ? score : score + bias[max(-a.reach, min(a.reach, key - position))];
}
