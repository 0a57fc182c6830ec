// Attention in bf16 by tensor cores, with float32 sums: 64 queries a block, 16 a warp; keys come by 32 through shared
// memory, some stages ahead of those that are multiplied. Scores are the products of product_tensor.cu, operands laid out as there: queries on the left, keys on the
// right. Shares of keys, rounded to bf16, are the left operand of the product with the values.

#if BF16

const int QUERIES = 64;
const int WIDTH = D_KV + 8; // of a row in shared memory: 16 bytes more, so that banks differ

const int KEY_STAGES = 4;

// Where values lie, and keys: of those two rows are read at a time, whose banks differ so.
__device__ __forceinline__ int value_place(int r, int d) { return r * WIDTH + d; }
__device__ __forceinline__ int key_place(int r, int d) { return D_KV % 64 ? r * WIDTH + d : r * D_KV + (d ^ r % 2 * 32); }

// Starts loading 32 rows of a head from `row` on, those from `end` on as zero.
template <bool ARE_KEYS> __device__ __forceinline__ void load_rows(const T *from, u32 stride, int row, int end, T *to) {
#pragma unroll
    for (int i = 0; i < D_KV / 32; ++i) {
        int at = threadIdx.x + i * 128, r = at / (D_KV / 8), d = at % (D_KV / 8) * 8;
        const T *own = from + u64(u32(min(row + r, end - 1))) * stride + d;
        T *place = to + (ARE_KEYS ? key_place(r, d) : value_place(r, d));
        // What is not read becomes zero.
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(u32(__cvta_generic_to_shared(place))), "l"(own),
                     "r"(row + r < end ? 16 : 0));
    }
}

// The right operands of 16 values' rows for 16 dimensions: two of 8 each.
__device__ __forceinline__ void load_values(const T *from, u32 (&b)[4]) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(b[0]), "=r"(b[1]), "=r"(b[2]), "=r"(b[3])
                 : "r"(u32(__cvta_generic_to_shared(from))));
}

// What is known of two runs of keys together: shares of both are of the larger of their largest scores.
struct Joint {
    float most, before, own;

    __device__ Joint(float first, float second)
        : most(fmaxf(first, second)), before(__expf(first - most)), own(__expf(second - most)) {}
    __device__ float of(float first, float second) const { return __fmaf_rn(second, own, __fmul_rn(first, before)); }
};

// What a warp has made of some keys for 16 rows, of which a thread has g and the one 8 further on. A head is for WARPS of them, each of
// which takes the next 16 values.
template <int WARPS> struct Attended {
    static const int PARTS = (D_KV / 16 + WARPS - 1) / WARPS;
    float most[2], total[2], sums[PARTS * 2][4];

    // The first of 16 values; of the last part there may be none.
    static __device__ __forceinline__ int part(int n) { return ((WARPS == 1 ? 0 : threadIdx.x / 32) + n * WARPS) * 16; }

    __device__ __forceinline__ void clear() {
        most[0] = most[1] = -INFINITY, total[0] = total[1] = 0;
#pragma unroll
        for (int d = 0; d < PARTS * 2; ++d)
#pragma unroll
            for (int i = 0; i < 4; ++i) sums[d][i] = 0;
    }

    // Adds 32 keys from `row` on, and their values. `is_whole`: every row sees all of them.
    template <int KEYS>
    __device__ __forceinline__ void add(const Attention &a, const uint4 (&upper)[D_KV / 32], const uint4 (&lower)[D_KV / 32],
                                        const T *ks, const T *vs, int row, int end, const int (&position)[2],
                                        const float *const (&bias)[2], bool is_whole) {
        int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
        float scores[4][4] = {};
        float now[2] = {most[0], most[1]};
#pragma unroll
        for (int n = 0; n < 4; ++n) {
#pragma unroll
            for (int c = 0; c < D_KV / 32; ++c)
                multiply32(scores[n], upper[c], lower[c],
                           *reinterpret_cast<const uint4 *>(ks + key_place(n * 8 + g, c * 32 + t * 8)));
        }
        if (is_whole) {
#pragma unroll
            for (int n = 0; n < 4; ++n)
#pragma unroll
                for (int i = 0; i < 4; ++i) scores[n][i] *= a.scale;
        } else {
#pragma unroll
            for (int n = 0; n < 4; ++n)
#pragma unroll
                for (int i = 0; i < 4; ++i)
                    scores[n][i] = biased<KEYS>(scores[n][i], a, bias[i / 2], row + n * 8 + t * 2 + i % 2, position[i / 2], end);
        }
#pragma unroll
        for (int n = 0; n < 4; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) now[i / 2] = fmaxf(now[i / 2], scores[n][i]);
        float before[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            now[half] = fmaxf(now[half], __shfl_xor_sync(~0u, now[half], 1));
            now[half] = fmaxf(now[half], __shfl_xor_sync(~0u, now[half], 2));
            before[half] = most[half] == -INFINITY ? 0.f : __expf(most[half] - now[half]);
            float sum = 0;
#pragma unroll
            for (int n = 0; n < 4; ++n)
#pragma unroll
                for (int i = half * 2; i < half * 2 + 2; ++i) {
                    scores[n][i] = scores[n][i] == -INFINITY ? 0.f : __expf(scores[n][i] - now[half]);
                    sum += scores[n][i];
                }
            total[half] = total[half] * before[half] + sum, most[half] = now[half];
        }
        // Times 1 nothing changes, which is what happens once the largest scores were seen.
        if (__any_sync(~0u, before[0] != 1 || before[1] != 1))
#pragma unroll
            for (int d = 0; d < PARTS * 2; ++d)
#pragma unroll
                for (int i = 0; i < 4; ++i) sums[d][i] *= before[i / 2];
#pragma unroll
        for (int k = 0; k < 2; ++k) {
            const float(&low)[4] = scores[k * 2], (&high)[4] = scores[k * 2 + 1];
            u32 a0 = pair(low[0], low[1]), a1 = pair(low[2], low[3]);
            u32 a2 = pair(high[0], high[1]), a3 = pair(high[2], high[3]);
#pragma unroll
            for (int d = 0; d < PARTS; ++d) {
                if (D_KV / 16 % WARPS && part(d) >= D_KV) break;
                u32 b[4];
                load_values(vs + value_place(k * 16 + lane % 16, part(d) + lane / 16 * 8), b);
                multiply(sums[d * 2], a0, a1, a2, a3, b[0], b[1]);
                multiply(sums[d * 2 + 1], a0, a1, a2, a3, b[2], b[3]);
            }
        }
    }

    // The end of a run: its threads know what all of them have.
    __device__ __forceinline__ void close() {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            total[half] += __shfl_xor_sync(~0u, total[half], 1);
            total[half] += __shfl_xor_sync(~0u, total[half], 2);
        }
    }

    // Takes the next run. One of which a row sees nothing changes no bit of it, and the first is taken as it is.
    __device__ __forceinline__ void join(const Attended &run) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            if (run.total[half] == 0) continue;
            bool is_first = total[half] == 0;
            Joint joint(most[half], run.most[half]);
            most[half] = joint.most, total[half] = is_first ? run.total[half] : joint.of(total[half], run.total[half]);
#pragma unroll
            for (int d = 0; d < PARTS * 2; ++d)
#pragma unroll
                for (int i = half * 2; i < half * 2 + 2; ++i)
                    sums[d][i] = is_first ? run.sums[d][i] : joint.of(sums[d][i], run.sums[d][i]);
        }
    }

    // Gives `put` each pair of sums of a row, and its place in the head.
    template <typename Put> __device__ __forceinline__ void each(int half, Put put) const {
#pragma unroll
        for (int d = 0; d < PARTS * 2; ++d) {
            if (D_KV / 16 % WARPS && part(d / 2) >= D_KV) break;
            put(part(d / 2) + d % 2 * 8 + threadIdx.x % 4 * 2, sums[d][half * 2], sums[d][half * 2 + 1]);
        }
    }

    // Writes the head of a row.
    __device__ __forceinline__ void put(int half, T *to) const {
        each(half, [&](int at, float first, float second) {
            *reinterpret_cast<u32 *>(to + at) = pair(first / total[half], second / total[half]);
        });
    }
};

// IS_LONG: keys may be more than one run.
template <int KEYS, bool IS_LONG> __device__ __forceinline__ void attend(const Attention &a) {
    extern __shared__ __align__(128) unsigned char memory[]; // (stages, keys and values, 32, WIDTH)
    static_assert(KEY_STAGES * 2 * 32 * WIDTH * sizeof(T) <= ATTENTION_SHARED_BYTES, "stages need more room");
    begin();
    if (ended(a.pass, a.layers)) return;
    Sequence s = a.sequences[blockIdx.y];
    Seen<KEYS> seen(a, s, QUERIES);
    if (seen.first >= s.rows) return;
    int t = threadIdx.x % 4, head = blockIdx.x;
    int query = seen.first + threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4; // and the one 8 further on
    uint4 upper[D_KV / 32], lower[D_KV / 32];
    const T *q = a.q + u64(s.first_row) * a.q_stride + head * D_KV + t * 8;
#pragma unroll
    for (int c = 0; c < D_KV / 32; ++c) {
        upper[c] = *reinterpret_cast<const uint4 *>(q + u64(min(query, s.rows - 1)) * a.q_stride + c * 32);
        lower[c] = *reinterpret_cast<const uint4 *>(q + u64(min(query + 8, s.rows - 1)) * a.q_stride + c * 32);
    }
    const float *own_bias = a.bias + head * (2 * a.reach + 1) + a.reach, *bias[2] = {own_bias, own_bias};
    const int position[2] = {s.position + query, s.position + query + 8};
    int next = seen.begin;
    auto fetch = [&]() {
        if (next < seen.end) {
            T *to = reinterpret_cast<T *>(memory) + (next - seen.begin) / 32 % KEY_STAGES * 2 * 32 * WIDTH;
            load_rows<true>(seen.keys, seen.stride, next, seen.end, to);
            load_rows<false>(seen.keys + a.kv_inner, seen.stride, next, seen.end, to + 32 * WIDTH);
            next += 32;
        }
        asm volatile("cp.async.commit_group;");
    };
    for (int stage = 0; stage < KEY_STAGES - 1; ++stage) fetch();
    auto add = [&](Attended<1> &to, int row, int until) {
        to.clear();
        for (; row < until; row += 32) {
            asm volatile("cp.async.wait_group %0;" ::"n"(KEY_STAGES - 2));
            __syncthreads();
            fetch();
            const T *ks = reinterpret_cast<const T *>(memory) + (row - seen.begin) / 32 % KEY_STAGES * 2 * 32 * WIDTH;
            // Most blocks see all of most tiles.
            int first = s.position + seen.first;
            bool is_whole = KEYS == CACHE && !a.bias && row + 31 <= first && first + QUERIES - 1 - row < a.window && row + 32 <= seen.end;
            to.add<KEYS>(a, upper, lower, ks, ks + 32 * WIDTH, row, seen.end, position, bias, is_whole);
        }
        to.close();
    };
    Attended<1> all;
    if (!IS_LONG) add(all, seen.begin, seen.end);
    else {
        all.clear();
        for (int row = seen.begin; row < seen.end; row = (row / RUN + 1) * RUN) {
            Attended<1> run;
            add(run, row, min(seen.end, (row / RUN + 1) * RUN));
            all.join(run);
        }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        int r = query + half * 8;
        if (r < s.rows) all.put(half, a.out + u64(s.first_row + r) * a.inner + head * D_KV);
    }
}

extern "C" __global__ void __launch_bounds__(128, 3) attend_own_rows(Attention a) { attend<OWN_ROWS, false>(a); }
extern "C" __global__ void __launch_bounds__(128, 3) attend_cache(Attention a) { attend<CACHE, false>(a); }
extern "C" __global__ void __launch_bounds__(128, 2) attend_long_cache(Attention a) { attend<CACHE, true>(a); }
extern "C" __global__ void __launch_bounds__(128) attend_input(Attention a) { attend<INPUT, false>(a); }

#endif
