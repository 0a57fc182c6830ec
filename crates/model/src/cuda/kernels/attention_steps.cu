// Attention of steps, a query for each sequence, to long caches in bf16. A block takes all heads that share keys and values, as the rows
// of one tile, so that a cache is read once; and one run of keys, or where other sequences keep the device busy all of them. Each
// of its four warps makes all shares, and a quarter of the values. The bits are those of `attend`.

#if BF16

// Of the one query of a sequence.
struct SeenByStep {
    int begin; // a multiple of 32
    int end;

    __device__ SeenByStep(const Attention &a, const Sequence &s) : begin(max(0, s.position + 1 - a.window) / 32 * 32), end(s.position + 1) {}
};

// Where the sums of a head and run are, D_KV of them; then their largest score, and their total.
__device__ __forceinline__ float *part_of(const Attention &a, const Sequence &s, int head, int run) {
    return a.parts + ((u64(s.first_row) * (a.inner / D_KV) + head) * a.runs + run) * (D_KV + 2);
}

extern "C" __global__ void __launch_bounds__(128, 3) attend_step(Attention a) {
    extern __shared__ __align__(128) unsigned char step_memory[]; // as in `attend`
    begin();
    if (ended(a.pass, a.layers)) return;
    Sequence s = a.sequences[blockIdx.y];
    SeenByStep seen(a, s);
    int t = threadIdx.x % 4, own = threadIdx.x % 32 / 4, heads[2];
    uint4 parts[2][D_KV / 32];
    const float *bias[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        heads[half] = blockIdx.x * a.group + min(own + half * 8, a.group - 1);
        bias[half] = a.bias + heads[half] * (2 * a.reach + 1) + a.reach;
        const T *q = a.q + u64(s.first_row) * a.q_stride + heads[half] * D_KV + t * 8;
#pragma unroll
        for (int c = 0; c < D_KV / 32; ++c) parts[half][c] = *reinterpret_cast<const uint4 *>(q + c * 32);
    }
    const int position[2] = {s.position, s.position};
    const T *keys = s.cache + u64(a.block) * s.capacity * 2 * a.kv_inner + blockIdx.x * D_KV;
    Attended<4> all;
    all.clear();
    for (int number = seen.begin / RUN + blockIdx.z; number * RUN < seen.end; number += gridDim.z) {
        int first = max(seen.begin, number * RUN), until = min(seen.end, (number + 1) * RUN), next = first;
        auto fetch = [&]() {
            if (next < until) {
                T *to = reinterpret_cast<T *>(step_memory) + (next - first) / 32 % KEY_STAGES * 2 * 32 * WIDTH;
                load_rows<true>(keys, 2 * a.kv_inner, next, seen.end, to);
                load_rows<false>(keys + a.kv_inner, 2 * a.kv_inner, next, seen.end, to + 32 * WIDTH);
                next += 32;
            }
            asm volatile("cp.async.commit_group;");
        };
        __syncthreads(); // all have read what the run before left
        for (int stage = 0; stage < KEY_STAGES - 1; ++stage) fetch();
        Attended<4> run;
        run.clear();
        for (int row = first; row < until; row += 32) {
            asm volatile("cp.async.wait_group %0;" ::"n"(KEY_STAGES - 2));
            __syncthreads();
            fetch();
            const T *ks = reinterpret_cast<const T *>(step_memory) + (row - first) / 32 % KEY_STAGES * 2 * 32 * WIDTH;
            bool is_whole = !a.bias && row + 31 <= s.position && s.position - row < a.window;
            run.add<CACHE>(a, parts[0], parts[1], ks, ks + 32 * WIDTH, row, seen.end, position, bias, is_whole);
        }
        run.close();
        if (!a.parts) {
            all.join(run);
            continue;
        }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            if (own + half * 8 >= a.group) continue;
            float *to = part_of(a, s, heads[half], number);
            run.each(half, [&](int at, float first, float second) {
                *reinterpret_cast<float2 *>(to + at) = make_float2(first, second);
            });
            if (threadIdx.x / 32 == 0 && t == 0) to[D_KV] = run.most[half], to[D_KV + 1] = run.total[half];
        }
    }
    if (a.parts) return;
#pragma unroll
    for (int half = 0; half < 2; ++half)
        if (own + half * 8 < a.group) all.put(half, a.out + u64(s.first_row) * a.inner + heads[half] * D_KV);
}

// Adds the runs of a head in order: a thread for each value of it.
extern "C" __global__ void __launch_bounds__(D_KV) join_runs(Attention a) {
    begin();
    if (ended(a.pass, a.layers)) return;
    Sequence s = a.sequences[blockIdx.y];
    SeenByStep seen(a, s);
    float most = -INFINITY, total = 0, sum = 0;
    for (int number = seen.begin / RUN; number * RUN < seen.end; ++number) {
        const float *part = part_of(a, s, blockIdx.x, number);
        float own_sum = part[threadIdx.x], own_most = part[D_KV], own_total = part[D_KV + 1];
        bool is_first = total == 0;
        Joint joint(most, own_most);
        most = joint.most;
        total = is_first ? own_total : joint.of(total, own_total), sum = is_first ? own_sum : joint.of(sum, own_sum);
    }
    narrow(sum / total, a.out + u64(s.first_row) * a.inner + blockIdx.x * D_KV + threadIdx.x);
}

#endif
