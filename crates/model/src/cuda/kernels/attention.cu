// Attention of T5: softmax(q K^T + bias) V, without a scale. A block makes 8 queries of one head of one sequence, two a
// warp; keys come by 32, one a lane. Sums over keys go in tiles of 32 from key 0 on, so they depend on no other
// sequence.

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

const int QUERIES = 8;
const int LANE_VALUES = D_KV / 32;

// Loads 32 rows of a head from `row` on, those from `end` on as zero.
__device__ __forceinline__ void load_rows(const T *from, u64 stride, int row, int end, float *to, int width) {
    for (int at = threadIdx.x * 4; at < 32 * D_KV; at += 128 * 4) {
        int r = at / D_KV, d = at % D_KV;
        float4 v = row + r < end ? wide4(from + (row + r) * stride + d) : make_float4(0, 0, 0, 0);
        float *place = to + r * width + d;
        place[0] = v.x, place[1] = v.y, place[2] = v.z, place[3] = v.w;
    }
}

template <int KEYS> __device__ __forceinline__ void attend(const Attention &a) {
    __shared__ float ks[32 * (D_KV + 1)], vs[32 * D_KV], qs[QUERIES * D_KV];
    if (ended(a.pass, a.layers)) return;
    Sequence s = a.sequences[blockIdx.y];
    int first = blockIdx.z * QUERIES, head = blockIdx.x, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    if (first >= s.rows) return;
    const T *keys = KEYS == OWN_ROWS ? a.q + u64(s.first_row) * a.q_stride + a.inner
                    : KEYS == CACHE  ? s.cache + u64(a.block) * s.capacity * 2 * a.inner
                                     : s.cross + u64(a.block) * s.cross_stride;
    u64 stride = KEYS == OWN_ROWS ? a.q_stride : 2 * a.inner;
    int end = KEYS == OWN_ROWS ? s.rows : KEYS == CACHE ? s.position + s.rows : s.input_rows;
    if (KEYS == CACHE) end = min(end, s.position + first + QUERIES);
    keys += head * D_KV;
    for (int at = threadIdx.x; at < QUERIES * D_KV; at += 128) {
        int r = min(first + at / D_KV, s.rows - 1);
        qs[at] = wide(a.q[u64(s.first_row + r) * a.q_stride + head * D_KV + at % D_KV]);
    }
    float most[2] = {-INFINITY, -INFINITY}, total[2] = {}, sums[2][LANE_VALUES] = {};
    const float *bias = a.bias + head * (2 * a.reach + 1) + a.reach;
    for (int row = 0; row < end; row += 32) {
        __syncthreads();
        load_rows(keys, stride, row, end, ks, D_KV + 1);
        load_rows(keys + a.inner, stride, row, end, vs, D_KV);
        __syncthreads();
        int key = row + lane;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const float *q = qs + (warp * 2 + i) * D_KV, *k = ks + lane * (D_KV + 1);
            int position = s.position + first + warp * 2 + i;
            float score = 0;
#pragma unroll 16
            for (int d = 0; d < D_KV; ++d) score += q[d] * k[d];
            if (KEYS != INPUT) score += bias[max(-a.reach, min(a.reach, key - position))];
            if (key >= end || (KEYS == CACHE && key > position)) score = -INFINITY;
            float now = fmaxf(most[i], warp_max(score));
            float before = most[i] == -INFINITY ? 0.f : expf(most[i] - now);
            float p = score == -INFINITY ? 0.f : expf(score - now);
            total[i] = total[i] * before + warp_sum(p), most[i] = now;
#pragma unroll
            for (int j = 0; j < LANE_VALUES; ++j) sums[i][j] *= before;
#pragma unroll 8
            for (int r = 0; r < 32; ++r) {
                float share = __shfl_sync(~0u, p, r);
#pragma unroll
                for (int j = 0; j < LANE_VALUES; ++j) sums[i][j] += share * vs[r * D_KV + j * 32 + lane];
            }
        }
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        int r = first + warp * 2 + i;
        if (r >= s.rows) continue;
        T *out = a.out + u64(s.first_row + r) * a.inner + head * D_KV;
        for (int j = 0; j < LANE_VALUES; ++j) narrow(sums[i][j] / total[i], out + j * 32 + lane);
    }
}

extern "C" __global__ void __launch_bounds__(128) attend_own_rows(Attention a) { attend<OWN_ROWS>(a); }
extern "C" __global__ void __launch_bounds__(128) attend_cache(Attention a) { attend<CACHE>(a); }
extern "C" __global__ void __launch_bounds__(128) attend_input(Attention a) { attend<INPUT>(a); }

// Puts the keys and values of a sequence's new rows into its cache: a block per sequence and row of it.
extern "C" __global__ void write_cache(Attention a) {
    if (ended(a.pass, a.layers)) return;
    Sequence s = a.sequences[blockIdx.x];
    for (int r = blockIdx.y; r < s.rows; r += gridDim.y) {
        const T *from = a.q + u64(s.first_row + r) * a.q_stride + a.inner;
        T *to = s.cache + (u64(a.block) * s.capacity + s.position + r) * 2 * a.inner;
        for (int i = threadIdx.x; i < 2 * a.inner; i += blockDim.x) to[i] = from[i];
    }
}
