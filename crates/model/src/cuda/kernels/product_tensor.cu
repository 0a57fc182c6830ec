// Products in bf16 by tensor cores, with float32 sums. W is the left operand (16 outputs a tile), x the right one (8
// rows a tile), so that an expert with few rows wastes little.
//
// Both operands lie row by row with k innermost. A thread takes 16 neighbouring bytes of a row, which serve two
// instructions: those see k in another order, the same for W and x, which changes no sum's terms. Within every 32 of k,
// thread t of a row's four has 8t to 8t + 7; the first instruction takes the lower four of each, the second the upper.
//
// k is cut into 4 runs that are summed by themselves and then added in order. `few` gives each run to a warp, `many` to two;
// so both give the same bits, and a row's do not depend on which was chosen.
// k is a multiple of 128, outputs of 16 (few) or 64, gated ones of half as many: a block multiplies as many rows of the gate as of
// what it gates.

#if BF16

__device__ __forceinline__ void multiply(float (&sum)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

__device__ __forceinline__ void multiply(float (&sum)[4], uint4 a, u32 b0, u32 b1) {
    multiply(sum, a.x, a.y, a.z, a.w, b0, b1);
}

// 16 outputs x 8 rows, 32 of k: `upper` are outputs 0 to 7, `lower` 8 to 15.
__device__ __forceinline__ void multiply32(float (&sum)[4], uint4 upper, uint4 lower, uint4 x) {
    multiply(sum, upper.x, lower.x, upper.y, lower.y, x.x, x.y);
    multiply(sum, upper.z, lower.z, upper.w, lower.w, x.z, x.w);
}

// The same times the scales of the outputs, where those are not in the weights.
template <bool IS_SCALED>
__device__ __forceinline__ void add32(float (&sum)[4], uint4 upper, uint4 lower, uint4 x, float upper_scale, float lower_scale) {
    if (!IS_SCALED) return multiply32(sum, upper, lower, x);
    float own[4] = {};
    multiply32(own, upper, lower, x);
    for (int i = 0; i < 4; ++i) sum[i] = fmaf(i < 2 ? upper_scale : lower_scale, own[i], sum[i]);
}

// A thread's part of a row of W: of every 32 of k the 8 from 8t on, as they are loaded and as they are multiplied.
struct PlainRow {
    typedef PlainRow OfFew;
    typedef uint4 Loaded;
    static const bool IS_SCALED = false;
    static const int AHEAD = 6; // for 8 rows
    const T *at;

    // `row` is one of `rows`.
    __device__ PlainRow(const Product &a, const void *w, int row, int rows, int t)
        : at(static_cast<const T *>(w) + u64(row) * a.k + t * 8) {}
    __device__ Loaded load(int k) const { return load_streaming(at + k); }
    __device__ uint4 weights(Loaded loaded) const { return loaded; }
    __device__ float scale(Loaded) const { return 1; }
};

// Four neighbours of a product: what its four runs made of them, added in order. From one run's to the next's are `apart`.
__device__ __forceinline__ float4 sum_of_runs(const float *parts, int apart) {
    float4 sum = wide4(parts);
    for (int run = 1; run < 4; ++run) {
        float4 part = wide4(parts + run * apart);
        sum = make_float4(sum.x + part.x, sum.y + part.y, sum.z + part.z, sum.w + part.w);
    }
    return sum;
}

// 16 outputs of 8 * TILES rows. AHEAD: how many times 32 of k are loaded before they are used. No kernel writes the weights of a
// dense layer, so where rows are few, and that counts, the first of them are loaded while the kernel before still runs.
template <int KIND, typename Row, int TILES, int AHEAD>
__device__ __forceinline__ void few_rows(const Product &a, const Rows<KIND> &rows, float *partial) {
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    const bool IS_GATED = Rows<KIND>::IS_GATED;
    int run = a.k / 4, o = blockIdx.x * (IS_GATED ? 8 : 16), outputs = IS_GATED ? a.outputs * 2 : a.outputs;
    Row upper(a, rows.w, o + g, outputs, t), lower(a, rows.w, o + g + (IS_GATED ? a.outputs : 8), outputs, t);
    int first = warp * run, end = first + run;
    typename Row::Loaded us[AHEAD], ls[AHEAD];
    const bool IS_EARLY = KIND < LOGITS && TILES == 1;
    auto load = [&](int k) {
#pragma unroll
        for (int i = 0; i < AHEAD; ++i) {
            if (k + 32 * i >= end) break;
            us[i] = upper.load(k + 32 * i), ls[i] = lower.load(k + 32 * i);
        }
    };
    if (IS_EARLY) load(first);
    if (KIND < GATHER && !rows.start(a)) return;
    const T *x[TILES];
    for (int j = 0; j < TILES; ++j)
        x[j] = static_cast<const T *>(a.x) + u64(rows.input(a, j * 8 + g)) * a.k + t * 8;
    float sums[TILES][4] = {};
    for (int k = first; k < end; k += 32 * AHEAD) {
        uint4 xs[AHEAD][TILES];
#pragma unroll
        for (int i = 0; i < AHEAD; ++i) {
            if (k + 32 * i >= end) break;
            if (!IS_EARLY) us[i] = upper.load(k + 32 * i), ls[i] = lower.load(k + 32 * i);
#pragma unroll
            for (int j = 0; j < TILES; ++j) xs[i][j] = *reinterpret_cast<const uint4 *>(x[j] + k + 32 * i);
        }
#pragma unroll
        for (int i = 0; i < AHEAD; ++i) {
            if (k + 32 * i >= end) break;
            uint4 u = upper.weights(us[i]), l = lower.weights(ls[i]);
            float u_scale = upper.scale(us[i]), l_scale = lower.scale(ls[i]);
#pragma unroll
            for (int j = 0; j < TILES; ++j) add32<Row::IS_SCALED>(sums[j], u, l, xs[i][j], u_scale, l_scale);
        }
        if (IS_EARLY) load(k + 32 * AHEAD);
    }
    // (warp, row, output), a row 20 wide so that banks differ
    for (int j = 0; j < TILES; ++j)
        for (int i = 0; i < 4; ++i)
            partial[(warp * 32 + j * 8 + t * 2 + i % 2) * 20 + g + i / 2 * 8] = sums[j][i];
    __syncthreads();
    // A thread puts four outputs of one of 32 rows.
    int r = threadIdx.x / 4, at = threadIdx.x % 4 * 4;
    if (r >= rows.count) return;
    if (IS_GATED && at >= 8) return;
    int row = rows.output(a, r);
    float4 before = rows.before(a, row, o + at), y = sum_of_runs(partial + r * 20 + at, 640);
    if (IS_GATED) y = gated(y, sum_of_runs(partial + r * 20 + 8 + at, 640));
    rows.put(a, row, o + at, y, before);
}

template <int KIND, typename Row> __device__ __forceinline__ void few_of(const Product &a) {
    __shared__ float partial[4 * 32 * 20];
    Rows<KIND> rows;
    if (KIND < GATHER) rows.take(a, KIND, 32, blockIdx.y);
    else if (!rows.find(a, 32)) return;
    if (rows.count <= 8) few_rows<KIND, typename Row::OfFew, 1, Row::AHEAD>(a, rows, partial);
    else if (rows.count <= 16) few_rows<KIND, Row, 2, 3>(a, rows, partial);
    else few_rows<KIND, Row, 4, 2>(a, rows, partial);
}

__device__ __forceinline__ void copy_ahead(void *to, const void *from) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(u32(__cvta_generic_to_shared(to))), "l"(from));
}

// A block of `many` makes 64 outputs of 64 rows. Each run of k has two warps of its own, of 32 outputs each, and what they
// multiply comes to shared memory by stages of 32 of k, several of them under way.
const int SIDE = 64, SUMS_WIDTH = SIDE + 4; // a row of sums is 4 wider, so that banks differ

// SIDE rows of W, of a gated one half of the gate and half of what it gates. A thread takes from shared memory what PlainRow
// takes.
template <bool IS_GATED> struct PlainTile {
    static const int BYTES = SIDE * 64; // of a stage
    static const int STAGES = 3;
    static const int HEADS = 0;
    static const bool IS_SCALED = false;
    const T *from;
    u64 apart, second; // from the first half of the rows to the second

    // From output o and from `k` on; `thread` is of a run's. `heads` is for packed ones.
    __device__ PlainTile(const Product &a, const void *w, int o, int k, int thread, uint4 *)
        : from(static_cast<const T *>(w) + u64(o + thread / 4) * a.k + k + thread % 4 * 8), apart(u64(SIDE / 4) * a.k),
          second(u64(IS_GATED ? a.outputs : SIDE / 2) * a.k) {}
    // The next stage.
    __device__ void copy(unsigned char *to, int thread) {
        for (int i = 0; i < 4; ++i) copy_ahead(to + (thread + i * SIDE) * 16, from + i / 2 * second + i % 2 * apart);
        from += 32;
    }
    __device__ uint4 weights(const unsigned char *tile, int at, int t) const {
        return *reinterpret_cast<const uint4 *>(tile + at * 64 + t * 16);
    }
    __device__ float scale(const unsigned char *, int) const { return 1; }
};

template <int KIND, typename W> __device__ __forceinline__ void many_of(const Product &a) {
    extern __shared__ __align__(128) unsigned char memory[];
    const int STAGE_BYTES = W::BYTES + SIDE * 64, STAGES = W::STAGES;
    static_assert(4 * STAGES * STAGE_BYTES + W::HEADS * 16 <= MANY_SHARED_BYTES, "stages need more room");
    static_assert(4 * SIDE * SUMS_WIDTH * 4 <= 4 * STAGES * STAGE_BYTES, "sums need more room");
    Rows<KIND> rows;
    if (!rows.find(a, SIDE)) return;
    int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, run = threadIdx.x / SIDE, thread = threadIdx.x % SIDE;
    const bool IS_GATED = Rows<KIND>::IS_GATED;
    int o = blockIdx.x * (IS_GATED ? SIDE / 2 : SIDE), outputs_at = thread / 32 * 32, steps = a.k / 128;
    unsigned char *stages = memory + run * (STAGES * STAGE_BYTES);
    W w(a, rows.w, o, run * (a.k / 4), thread, reinterpret_cast<uint4 *>(memory + 4 * STAGES * STAGE_BYTES));
    const unsigned char *x = static_cast<const unsigned char *>(a.x) + (run * (a.k / 4) + thread % 4 * 8) * sizeof(T);
    u32 rows_at[4];
    for (int i = 0; i < 4; ++i) rows_at[i] = rows.input(a, thread / 4 + i * (SIDE / 4)) * a.k * sizeof(T);
    int fetched = 0, fetch_to = 0;
    auto fetch = [&]() {
        if (fetched++ < steps) {
            w.copy(stages + fetch_to, thread);
            unsigned char *to = stages + fetch_to + W::BYTES + thread * 16;
#pragma unroll
            for (int i = 0; i < 4; ++i) copy_ahead(to + i * SIDE * 16, x + rows_at[i]);
            x += 64;
            fetch_to = fetch_to == (STAGES - 1) * STAGE_BYTES ? 0 : fetch_to + STAGE_BYTES;
        }
        asm volatile("cp.async.commit_group;");
    };
    for (int step = 0; step < STAGES - 1; ++step) fetch();
    float parts[8][2][4] = {};
    // It is 0, which the compiler cannot know. Words that it is added to are put where the instruction takes them from once;
    // else they would be copied there before each.
    const u32 zero = u32(a.rows) >> 31;
    const unsigned char *stage = stages, *last = stages + (STAGES - 1) * STAGE_BYTES;
    for (int step = 0; step < steps; ++step) {
        asm volatile("cp.async.wait_group %0;" ::"n"(STAGES - 2));
        asm volatile("bar.sync %0, %1;" ::"r"(run + 1), "n"(SIDE) : "memory"); // the threads of this run
        fetch();
        uint4 left[2][2];
        float scales[2][2];
#pragma unroll
        for (int m = 0; m < 2; ++m) {
            scales[m][0] = w.scale(stage, outputs_at + m * 16 + g), scales[m][1] = w.scale(stage, outputs_at + m * 16 + 8 + g);
            uint4 upper = w.weights(stage, outputs_at + m * 16 + g, t), lower = w.weights(stage, outputs_at + m * 16 + 8 + g, t);
            left[m][0] = make_uint4(upper.x + zero, lower.x + zero, upper.y + zero, lower.y + zero);
            left[m][1] = make_uint4(upper.z + zero, lower.z + zero, upper.w + zero, lower.w + zero);
        }
        auto multiply_rows = [&](int n) {
            uint4 xs = *reinterpret_cast<const uint4 *>(stage + W::BYTES + (n * 8 + g) * 64 + t * 16);
            float own[2][4] = {};
            auto &sums = W::IS_SCALED ? own : parts[n];
#pragma unroll
            for (int m = 0; m < 2; ++m) multiply(sums[m], left[m][0], xs.x, xs.y);
#pragma unroll
            for (int m = 0; m < 2; ++m) multiply(sums[m], left[m][1], xs.z, xs.w);
            if (W::IS_SCALED)
#pragma unroll
                for (int m = 0; m < 2; ++m)
                    for (int i = 0; i < 4; ++i) parts[n][m][i] = fmaf(scales[m][i / 2], own[m][i], parts[n][m][i]);
        };
#pragma unroll
        for (int n = 0; n < 4; ++n) multiply_rows(n);
        if (rows.count > 32)
#pragma unroll
            for (int n = 4; n < 8; ++n) multiply_rows(n);
        stage = stage == last ? stages : stage + STAGE_BYTES;
    }
    __syncthreads();
    float *partial = reinterpret_cast<float *>(memory); // (run, row, output)
#pragma unroll
    for (int m = 0; m < 2; ++m)
#pragma unroll
        for (int n = 0; n < 8; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i)
                partial[(run * SIDE + n * 8 + t * 2 + i % 2) * SUMS_WIDTH + outputs_at + m * 16 + g + i / 2 * 8] = parts[n][m][i];
    __syncthreads();
    // A thread puts four outputs of four rows.
    float4 before[4];
    int r = threadIdx.x / 16, at = threadIdx.x % 16 * 4, to[4];
    if (IS_GATED && at >= SIDE / 2) return;
#pragma unroll
    for (int i = 0; i < 4; ++i)
        if (r + i * 16 < rows.count) {
            to[i] = rows.output(a, r + i * 16);
            before[i] = rows.before(a, to[i], o + at);
        }
#pragma unroll
    for (int i = 0; i < 4; ++i)
        if (r + i * 16 < rows.count) {
            const float *own = partial + (r + i * 16) * SUMS_WIDTH + at;
            float4 y = sum_of_runs(own, SIDE * SUMS_WIDTH);
            if (IS_GATED) y = gated(y, sum_of_runs(own + SIDE / 2, SIDE * SUMS_WIDTH));
            rows.put(a, to[i], o + at, y, before[i]);
        }
}

#endif
