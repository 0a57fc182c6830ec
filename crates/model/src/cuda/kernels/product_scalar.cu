// Products of a float32 model, without tensor cores.
// A block is 4 warps; a warp makes 4 outputs of 8 rows, or 2 gated ones; its lanes share k. k is a multiple of 128, outputs of 4.

#if !BF16

template <int KIND> __device__ __forceinline__ void scalar(const Product &a) {
    Rows<KIND> rows;
    if (!rows.find(a, 8)) return;
    const bool IS_GATED = Rows<KIND>::IS_GATED;
    int lane = threadIdx.x % 32, o = (blockIdx.x * 16 + threadIdx.x / 32 * 4) / (IS_GATED ? 2 : 1);
    if (o >= a.outputs) return;
    const float *w = static_cast<const float *>(rows.w) + u64(o) * a.k + lane * 4;
    const float *x[8];
    for (int r = 0; r < 8; ++r) x[r] = static_cast<const float *>(a.x) + u64(rows.input(a, r)) * a.k + lane * 4;
    float sums[4][8] = {};
    for (int k = 0; k < a.k; k += 128) {
        float4 ws[4];
        for (int j = 0; j < 4; ++j) ws[j] = wide4(w + u64(IS_GATED && j > 1 ? a.outputs + j - 2 : j) * a.k + k);
        for (int r = 0; r < 8; ++r) {
            float4 v = wide4(x[r] + k);
            for (int j = 0; j < 4; ++j)
                sums[j][r] += v.x * ws[j].x + v.y * ws[j].y + v.z * ws[j].z + v.w * ws[j].w;
        }
    }
    // Lane r puts row r.
    float4 own = make_float4(0, 0, 0, 0);
    for (int r = 0; r < 8; ++r) {
        float4 y = make_float4(warp_sum(sums[0][r]), warp_sum(sums[1][r]), warp_sum(sums[2][r]), warp_sum(sums[3][r]));
        if (lane == r) own = y;
    }
    if (lane >= min(rows.count, 8)) return;
    int row = rows.output(a, lane);
    if (IS_GATED) rows.put_gated(a, row, o, make_float2(gated(own.x, own.z), gated(own.y, own.w)));
    else rows.put(a, row, o, own, rows.before(a, row, o));
}

KINDS(few, scalar, 128, 1)

#endif
