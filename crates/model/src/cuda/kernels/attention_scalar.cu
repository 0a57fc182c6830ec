// Attention in float32 arithmetic, for float32 models: 8 queries a block, two a warp; keys come by 32, one a lane.

#if !BF16

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
    begin();
    if (ended(a.pass, a.layers)) return;
    Sequence s = a.sequences[blockIdx.y];
    Seen<KEYS> seen(a, s, QUERIES);
    int first = seen.first, end = seen.end, head = blockIdx.x, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    if (first >= s.rows) return;
    for (int at = threadIdx.x; at < QUERIES * D_KV; at += 128) {
        int r = min(first + at / D_KV, s.rows - 1);
        qs[at] = widen(a.q[u64(s.first_row + r) * a.q_stride + head * D_KV + at % D_KV]);
    }
    float most[2] = {-INFINITY, -INFINITY}, total[2] = {}, sums[2][LANE_VALUES] = {};
    const float *bias = a.bias + head * (2 * a.reach + 1) + a.reach;
    for (int row = seen.begin; row < end; row += 32) {
        __syncthreads();
        load_rows(seen.keys, seen.stride, row, end, ks, D_KV + 1);
        load_rows(seen.keys + a.kv_inner, seen.stride, row, end, vs, D_KV);
        __syncthreads();
        int key = row + lane;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const float *q = qs + (warp * 2 + i) * D_KV, *k = ks + lane * (D_KV + 1);
            int position = s.position + first + warp * 2 + i;
            float score = 0;
#pragma unroll 16
            for (int d = 0; d < D_KV; ++d) score += q[d] * k[d];
            score = biased<KEYS>(score, a, bias, key, position, end);
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

#endif
