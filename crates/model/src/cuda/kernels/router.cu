// The logits of routers, in float32 whatever a model is in: few outputs, which are waited for.

// 32 sums over the lanes of a warp, of which each lane keeps one: as `warp_sum` adds them, but after each step half as many are left.
template <int HALF> __device__ __forceinline__ void fold(float (&sums)[32]) {
    bool is_upper = threadIdx.x & HALF;
#pragma unroll
    for (int i = 0; i < HALF; ++i) {
        float kept = is_upper ? sums[i + HALF] : sums[i], sent = is_upper ? sums[i] : sums[i + HALF];
        sums[i] = kept + __shfl_xor_sync(~0u, sent, HALF);
    }
    if constexpr (HALF > 1) fold<HALF / 2>(sums);
}

// A block makes 4 outputs of 8 rows; its warps share k, so that little of
// it comes one after another. The first weights are loaded while the kernel before still runs.
extern "C" __global__ void __launch_bounds__(128) router_logits(Product a) {
    const int AHEAD = 4;
    __shared__ float parts[4][32];
    Rows<LOGITS> rows;
    rows.take(a, LOGITS, 8, blockIdx.y);
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, o = blockIdx.x * 4;
    const float *w = static_cast<const float *>(rows.w) + u64(o) * a.k + lane * 4;
    float4 ws[AHEAD][4];
    auto load = [&](int k) {
#pragma unroll
        for (int i = 0; i < AHEAD; ++i)
#pragma unroll
            for (int j = 0; j < 4; ++j)
                if (k + i * 512 < a.k) ws[i][j] = wide4(w + u64(j) * a.k + k + i * 512);
    };
    load(warp * 128);
    if (!rows.start(a)) return;
    const T *x = static_cast<const T *>(a.x) + u64(rows.first) * a.k + lane * 4;
    float sums[32] = {}; // of row r, output j: 4 * r + j
    for (int k = warp * 128; k < a.k; k += AHEAD * 512) {
#pragma unroll
        for (int i = 0; i < AHEAD; ++i) {
            if (k + i * 512 >= a.k) break;
            float4 v[8];
#pragma unroll
            for (int r = 0; r < 8; ++r)
                if (r < rows.count) v[r] = wide4(x + u64(r) * a.k + k + i * 512);
#pragma unroll
            for (int r = 0; r < 8; ++r) {
                if (r >= rows.count) break;
#pragma unroll
                for (int j = 0; j < 4; ++j)
                    sums[r * 4 + j] += v[r].x * ws[i][j].x + v[r].y * ws[i][j].y + v[r].z * ws[i][j].z + v[r].w * ws[i][j].w;
            }
        }
        load(k + AHEAD * 512);
    }
    fold<16>(sums);
    parts[warp][lane] = sums[0];
    __syncthreads();
    if (warp || lane / 4 >= rows.count) return;
    float sum = parts[0][lane] + parts[1][lane] + parts[2][lane] + parts[3][lane];
    static_cast<float *>(a.out)[u64(rows.first + lane / 4) * a.outputs + o + lane % 4] = sum;
}

// The same bits for many rows: a block makes 8 outputs of 32 rows, so that what it reads serves more of them. Four warps share k as
// above, for each 8 rows.
extern "C" __global__ void __launch_bounds__(512, 1) router_logits_many(Product a) {
    __shared__ float parts[4][4][64];
    Rows<LOGITS> rows;
    if (!rows.find(a, 32)) return;
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4, eight = threadIdx.x / 128, o = blockIdx.x * 8;
    const float *w = static_cast<const float *>(rows.w) + u64(o) * a.k + lane * 4;
    const T *x = static_cast<const T *>(a.x) + lane * 4;
    u32 rows_at[8];
#pragma unroll
    for (int r = 0; r < 8; ++r) rows_at[r] = rows.input(a, eight * 8 + r) * a.k;
    float sums[2][32] = {}; // of four outputs of 8 rows each
    for (int k = warp * 128; k < a.k; k += 512) {
        float4 v[8];
#pragma unroll
        for (int r = 0; r < 8; ++r) v[r] = wide4(x + (rows_at[r] + k));
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            float4 own = wide4(w + u64(j) * a.k + k);
#pragma unroll
            for (int r = 0; r < 8; ++r)
                sums[j / 4][r * 4 + j % 4] += v[r].x * own.x + v[r].y * own.y + v[r].z * own.z + v[r].w * own.w;
        }
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        fold<16>(sums[i]);
        parts[eight][warp][i * 32 + lane] = sums[i][0];
    }
    __syncthreads();
    if (threadIdx.x >= 256) return;
    int r = threadIdx.x / 8, j = threadIdx.x % 8, at = j / 4 * 32 + r % 8 * 4 + j % 4;
    if (r >= rows.count) return;
    const float(&own)[4][64] = parts[r / 8];
    static_cast<float *>(a.out)[u64(rows.first + r) * a.outputs + o + j] = own[0][at] + own[1][at] + own[2][at] + own[3][at];
}
