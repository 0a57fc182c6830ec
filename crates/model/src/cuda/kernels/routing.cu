// Which expert each token of an MoE layer goes to, whether it is there, and the rows grouped by expert.

struct Route {
    const float *logits; // (rows, experts)
    unsigned short *chosen; // (rows)
    float *alpha;           // (rows): the factor of the expert's output, its probability
    const int *slots;       // (experts): where each expert of the layer is, -1: nowhere; null: nobody asks
    Pass *pass;
    Tile *few;  // groups of at most few_rows rows in one tile each, or all in tiles of few_tile
    Tile *many; // the others, in tiles of many_tile
    int *counts; // how many tiles of both
    u32 *order;
    int rows;
    int experts;
    int layer;
    int few_rows;
    int few_tile;
    int many_tile;
};

// The most probable expert of one token, the lowest where two are equal. A warp; lanes share the experts.
__device__ __forceinline__ void choose(const Route &a, int token) {
    const float *logits = a.logits + u64(token) * a.experts;
    int lane = threadIdx.x % 32, best = 0x7fffffff;
    float most = -INFINITY;
    for (int e = lane; e < a.experts; e += 32)
        if (logits[e] > most) most = logits[e], best = e;
    for (int offset = 16; offset; offset >>= 1) {
        float other = __shfl_xor_sync(~0u, most, offset);
        int other_best = __shfl_xor_sync(~0u, best, offset);
        if (other > most || (other == most && other_best < best)) most = other, best = other_best;
    }
    if (best == 0x7fffffff) best = 0; // a row of NaN
    float sum = 0;
    for (int e = lane; e < a.experts; e += 32) sum += expf(logits[e] - most);
    sum = warp_sum(sum);
    if (lane == 0) {
        a.chosen[token] = best;
        a.alpha[token] = 1 / sum;
        if (a.slots && a.slots[best] < 0) atomicMin(&a.pass->stop, a.layer);
    }
}

__device__ __forceinline__ bool route_ended(const Route &a) { return ended(a.pass, a.layer); }

// A warp per token, for more rows than one block chooses quickly.
extern "C" __global__ void choose_experts(Route a) {
    begin();
    if (route_ended(a)) return;
    int token = (blockIdx.x * blockDim.x + threadIdx.x) / 32;
    if (token < a.rows) choose(a, token);
}

// Groups of this many rows: how many tiles they make, few ones in the upper half of 20 bits each.
__device__ __forceinline__ u64 tiles_of(const Route &a, u32 rows) {
    if (int(rows) <= a.few_rows) return u64((rows + a.few_tile - 1) / a.few_tile) << 20;
    return u64((rows + a.many_tile - 1) / a.many_tile) << 40;
}

// One block of 1024: orders tokens by expert and cuts the groups into tiles. At most 1024 experts.
__device__ __forceinline__ void group(const Route &a) {
    __shared__ u32 counts[1024];
    __shared__ u32 taken[1024];
    __shared__ u64 sums[1024];
    int e = threadIdx.x;
    counts[e] = 0, taken[e] = 0;
    __syncthreads();
    for (int token = e; token < a.rows; token += 1024) atomicAdd(&counts[a.chosen[token]], 1);
    __syncthreads();
    u64 own = counts[e] + tiles_of(a, counts[e]);
    sums[e] = own;
    for (int offset = 1; offset < 1024; offset <<= 1) {
        __syncthreads();
        u64 before = e >= offset ? sums[e - offset] : 0;
        __syncthreads();
        sums[e] += before;
    }
    __syncthreads();
    if (e == 1023) a.counts[0] = sums[e] >> 20 & 0xfffff, a.counts[1] = sums[e] >> 40;
    u64 before = sums[e] - own;
    int first = before & 0xfffff, rows = counts[e];
    if (rows > 0) {
        bool is_few = rows <= a.few_rows;
        int tile = is_few ? a.few_tile : a.many_tile;
        Tile *to = is_few ? a.few + (before >> 20 & 0xfffff) : a.many + (before >> 40);
        for (int done = 0; done < rows; done += tile)
            *to++ = Tile{a.slots[e], first + done, min(tile, rows - done), 0};
    }
    for (int token = e; token < a.rows; token += 1024) {
        int expert = a.chosen[token];
        u32 place = (expert ? sums[expert - 1] & 0xfffff : 0) + atomicAdd(&taken[expert], 1);
        a.order[place] = token;
    }
}

// What choose_experts chose. One block of 1024.
extern "C" __global__ void __launch_bounds__(1024) group_rows(Route a) {
    begin();
    if (!route_ended(a)) group(a);
}

// Both at once, for few rows. One block of 1024.
extern "C" __global__ void __launch_bounds__(1024) choose_and_group(Route a) {
    begin();
    if (route_ended(a)) return;
    for (int token = threadIdx.x / 32; token < a.rows; token += 32) choose(a, token);
    __syncthreads();
    group(a);
}
