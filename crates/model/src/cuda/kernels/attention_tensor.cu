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

template <int KEYS> __device__ __forceinline__ void attend(const Attention &a) {
    extern __shared__ __align__(128) unsigned char memory[]; // (stages, keys and values, 32, WIDTH)
    static_assert(KEY_STAGES * 2 * 32 * WIDTH * sizeof(T) <= ATTENTION_SHARED_BYTES, "stages need more room");
    begin();
    if (ended(a.pass, a.layers)) return;
    Sequence s = a.sequences[blockIdx.y];
    Seen<KEYS> seen(a, s, QUERIES);
    if (seen.first >= s.rows) return;
    int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, head = blockIdx.x;
    int query = seen.first + threadIdx.x / 32 * 16 + g; // and the one 8 further on
    uint4 upper[D_KV / 32], lower[D_KV / 32];
    const T *q = a.q + u64(s.first_row) * a.q_stride + head * D_KV + t * 8;
#pragma unroll
    for (int c = 0; c < D_KV / 32; ++c) {
        upper[c] = *reinterpret_cast<const uint4 *>(q + u64(min(query, s.rows - 1)) * a.q_stride + c * 32);
        lower[c] = *reinterpret_cast<const uint4 *>(q + u64(min(query + 8, s.rows - 1)) * a.q_stride + c * 32);
    }
    const float *bias = a.bias + head * (2 * a.reach + 1) + a.reach;
    float most[2] = {-INFINITY, -INFINITY}, total[2] = {}, sums[D_KV / 8][4] = {};
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
    for (int row = seen.begin; row < seen.end; row += 32) {
        asm volatile("cp.async.wait_group %0;" ::"n"(KEY_STAGES - 2));
        __syncthreads();
        fetch();
        const T *ks = reinterpret_cast<const T *>(memory) + (row - seen.begin) / 32 % KEY_STAGES * 2 * 32 * WIDTH;
        const T *vs = ks + 32 * WIDTH;
        float scores[4][4] = {};
        float now[2] = {most[0], most[1]};
        // Whether every query of the block sees all of the tile, as most do.
        int first = s.position + seen.first;
        bool is_whole = KEYS == CACHE && !a.bias && row + 31 <= first && first + QUERIES - 1 - row < a.window && row + 32 <= seen.end;
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
                for (int i = 0; i < 4; ++i) {
                    int key = row + n * 8 + t * 2 + i % 2, position = s.position + query + i / 2 * 8;
                    scores[n][i] = biased<KEYS>(scores[n][i], a, bias, key, position, seen.end);
                }
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
            for (int d = 0; d < D_KV / 8; ++d)
#pragma unroll
                for (int i = 0; i < 4; ++i) sums[d][i] *= before[i / 2];
#pragma unroll
        for (int k = 0; k < 2; ++k) {
            const float(&low)[4] = scores[k * 2], (&high)[4] = scores[k * 2 + 1];
            u32 a0 = pair(low[0], low[1]), a1 = pair(low[2], low[3]);
            u32 a2 = pair(high[0], high[1]), a3 = pair(high[2], high[3]);
#pragma unroll
            for (int d = 0; d < D_KV / 16; ++d) {
                u32 b[4];
                load_values(vs + value_place(k * 16 + lane % 16, d * 16 + lane / 16 * 8), b);
                multiply(sums[d * 2], a0, a1, a2, a3, b[0], b[1]);
                multiply(sums[d * 2 + 1], a0, a1, a2, a3, b[2], b[3]);
            }
        }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        total[half] += __shfl_xor_sync(~0u, total[half], 1);
        total[half] += __shfl_xor_sync(~0u, total[half], 2);
        int r = query + half * 8;
        if (r >= s.rows) continue;
        T *out = a.out + u64(s.first_row + r) * a.inner + head * D_KV + t * 2;
#pragma unroll
        for (int d = 0; d < D_KV / 8; ++d)
            *reinterpret_cast<u32 *>(out + d * 8) =
                pair(sums[d][half * 2] / total[half], sums[d][half * 2 + 1] / total[half]);
    }
}

extern "C" __global__ void __launch_bounds__(128) attend_own_rows(Attention a) { attend<OWN_ROWS>(a); }
extern "C" __global__ void __launch_bounds__(128, 3) attend_cache(Attention a) { attend<CACHE>(a); }
extern "C" __global__ void __launch_bounds__(128) attend_input(Attention a) { attend<INPUT>(a); }

#endif
