// Products in bf16 by tensor cores, with float32 sums. W is the left operand (16 outputs a tile), x the right one (8
// rows a tile), so that an expert with few rows wastes little.
//
// Both operands lie row by row with k innermost. A thread takes 16 neighbouring bytes of a row, which serve two
// instructions: those see k in another order, the same for W and x, which changes no sum's terms. Within every 32 of k,
// thread t of a row's four has 8t to 8t + 7; the first instruction takes the lower four of each, the second the upper.
//
// k is cut into 4 runs that are summed by themselves and then added in order. `few` gives each run to a warp, `many`
// does one after another; so both give the same bits, and a row's do not depend on which was chosen.
// k is a multiple of 128, outputs of 16 (few) or 128.

#if BF16

__device__ __forceinline__ void multiply(float (&sum)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// 16 outputs x 8 rows, 32 of k: `upper` are outputs 0 to 7, `lower` 8 to 15.
__device__ __forceinline__ void multiply32(float (&sum)[4], uint4 upper, uint4 lower, uint4 x) {
    multiply(sum, upper.x, lower.x, upper.y, lower.y, x.x, x.y);
    multiply(sum, upper.z, lower.z, upper.w, lower.w, x.z, x.w);
}

// A thread's part of a row of W: of every 32 of k the 8 from 8t on, as they are loaded and as they are multiplied.
struct PlainRow {
    typedef T Element;
    typedef PlainRow OfFew;
    typedef uint4 Loaded;
    const T *at;

    __device__ PlainRow(const Product &a, const void *w, int row, int t)
        : at(static_cast<const T *>(w) + u64(row) * a.k + t * 8) {}
    __device__ Loaded load(int k) const { return load_streaming(at + k); }
    __device__ uint4 weights(Loaded loaded) const { return loaded; }
};

// 16 outputs of 8 * TILES rows. AHEAD: how many times 32 of k are loaded before they are used.
template <int KIND, typename Row, int TILES, int AHEAD>
__device__ __forceinline__ void few_rows(const Product &a, const Rows<KIND> &rows, float *partial) {
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    int run = a.k / 4, o = blockIdx.x * 16;
    Row upper(a, rows.w, o + g, t), lower(a, rows.w, o + g + 8, t);
    const T *x[TILES];
    for (int j = 0; j < TILES; ++j)
        x[j] = static_cast<const T *>(a.x) + u64(rows.input(a, j * 8 + g)) * a.k + t * 8;
    float sums[TILES][4] = {};
    int k = warp * run, end = k + run;
    for (; k + 32 * AHEAD <= end; k += 32 * AHEAD) {
        typename Row::Loaded us[AHEAD], ls[AHEAD];
        uint4 xs[AHEAD][TILES];
#pragma unroll
        for (int i = 0; i < AHEAD; ++i) {
            us[i] = upper.load(k + 32 * i), ls[i] = lower.load(k + 32 * i);
#pragma unroll
            for (int j = 0; j < TILES; ++j) xs[i][j] = *reinterpret_cast<const uint4 *>(x[j] + k + 32 * i);
        }
#pragma unroll
        for (int i = 0; i < AHEAD; ++i) {
            uint4 u = upper.weights(us[i]), l = lower.weights(ls[i]);
#pragma unroll
            for (int j = 0; j < TILES; ++j) multiply32(sums[j], u, l, xs[i][j]);
        }
    }
    for (; k < end; k += 32) {
        uint4 u = upper.weights(upper.load(k)), l = lower.weights(lower.load(k));
#pragma unroll
        for (int j = 0; j < TILES; ++j) multiply32(sums[j], u, l, *reinterpret_cast<const uint4 *>(x[j] + k));
    }
    // (warp, row, output), a row 20 wide so that banks differ
    for (int j = 0; j < TILES; ++j)
        for (int i = 0; i < 4; ++i)
            partial[(warp * 32 + j * 8 + t * 2 + i % 2) * 20 + g + i / 2 * 8] = sums[j][i];
    __syncthreads();
    for (int at = threadIdx.x; at < rows.count * 16; at += 128) {
        int place = at / 16 * 20 + at % 16;
        float y = partial[place] + partial[place + 640] + partial[place + 1280] + partial[place + 1920];
        rows.put(a, at / 16, o + at % 16, y);
    }
}

template <int KIND, typename Row> __device__ __forceinline__ void few_of(const Product &a) {
    __shared__ float partial[4 * 32 * 20];
    Rows<KIND> rows;
    if (!rows.template find<typename Row::Element>(a, 32)) return;
    if (rows.count <= 8) few_rows<KIND, typename Row::OfFew, 1, 6>(a, rows, partial);
    else if (rows.count <= 16) few_rows<KIND, Row, 2, 3>(a, rows, partial);
    else few_rows<KIND, Row, 4, 2>(a, rows, partial);
}

template <int KIND> __device__ __forceinline__ void few(const Product &a) { few_of<KIND, PlainRow>(a); }

KINDS(few, few, 128, 1)

__device__ __forceinline__ void copy_ahead(void *to, const void *from) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(u32(__cvta_generic_to_shared(to))), "l"(from));
}

// 128 rows of W, 32 of k at a time, by way of shared memory. A thread takes from there what PlainRow takes.
struct PlainTile {
    typedef T Element;
    static const int BYTES = 128 * 64;
    static const int HEADS = 1; // none are needed
    static const int OUTPUTS = 32;
    const T *from;
    u64 half;

    __device__ PlainTile(const Product &a, const void *w, int row, uint4 *)
        : from(static_cast<const T *>(w) + u64(row + threadIdx.x / 4) * a.k + threadIdx.x % 4 * 8), half(64 * u64(a.k)) {}
    __device__ void copy(unsigned char *to, int step) const {
        copy_ahead(to + threadIdx.x * 16, from + step * 32);
        copy_ahead(to + 4096 + threadIdx.x * 16, from + half + step * 32);
    }
    __device__ uint4 weights(const unsigned char *tile, int at, int t) const {
        return *reinterpret_cast<const uint4 *>(tile + at * 64 + t * 16);
    }
};

// 128 outputs x 64 rows; each of 8 warps makes 32 x 32, or 16 x 64 where W must be unpacked, which then is done once. Stages
// of 32 of k, STAGES of them under way. (Tiles of 128 rows
// were slower: they leave room for one block a multiprocessor only.)
const int STAGES = 4;

template <int KIND, typename W> __device__ __forceinline__ void many_of(const Product &a) {
    const int STAGE_BYTES = W::BYTES + 64 * 64;
    __shared__ __align__(128) unsigned char stages[STAGES * STAGE_BYTES];
    Rows<KIND> rows;
    if (!rows.template find<typename W::Element>(a, 64)) return;
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    const int M = W::OUTPUTS / 16, N = 8 / M;
    int o = blockIdx.x * 128, outputs_at = warp / M * W::OUTPUTS, rows_at = warp % M * 8 * N;
    __shared__ uint4 heads[W::HEADS];
    W w(a, rows.w, o, heads);
    const T *x = static_cast<const T *>(a.x) + u64(rows.input(a, threadIdx.x / 4)) * a.k + threadIdx.x % 4 * 8;
    auto fetch = [&](int step) {
        if (step * 32 < a.k) {
            unsigned char *to = stages + step % STAGES * STAGE_BYTES;
            w.copy(to, step);
            copy_ahead(to + W::BYTES + threadIdx.x * 16, x + step * 32);
        }
        asm volatile("cp.async.commit_group;");
    };
    for (int step = 0; step < STAGES - 1; ++step) fetch(step);
    float sums[M][N][4] = {};
    int steps = a.k / 128, step = 0;
    for (int run = 0; run < 4; ++run) {
        float parts[M][N][4] = {};
        for (int end = step + steps; step < end; ++step) {
            asm volatile("cp.async.wait_group %0;" ::"n"(STAGES - 2));
            __syncthreads();
            fetch(step + STAGES - 1);
            const unsigned char *stage = stages + step % STAGES * STAGE_BYTES;
            uint4 xs[N];
#pragma unroll
            for (int n = 0; n < N; ++n)
                xs[n] = *reinterpret_cast<const uint4 *>(stage + W::BYTES + (rows_at + n * 8 + g) * 64 + t * 16);
#pragma unroll
            for (int m = 0; m < M; ++m) {
                uint4 upper = w.weights(stage, outputs_at + m * 16 + g, t);
                uint4 lower = w.weights(stage, outputs_at + m * 16 + 8 + g, t);
#pragma unroll
                for (int n = 0; n < N; ++n) multiply32(parts[m][n], upper, lower, xs[n]);
            }
        }
#pragma unroll
        for (int i = 0; i < 32; ++i) {
            float &sum = sums[i / 4 / N][i / 4 % N][i % 4], part = parts[i / 4 / N][i / 4 % N][i % 4];
            sum = run ? sum + part : part;
        }
    }
#pragma unroll
    for (int i = 0; i < 32; ++i) {
        int r = rows_at + i / 4 % N * 8 + t * 2 + i % 2, at = o + outputs_at + i / 4 / N * 16 + g + i % 4 / 2 * 8;
        if (r < rows.count) rows.put(a, r, at, sums[i / 4 / N][i / 4 % N][i % 4]);
    }
}

template <int KIND> __device__ __forceinline__ void many(const Product &a) { many_of<KIND, PlainTile>(a); }

KINDS(many, many, 256, 2)

#endif
