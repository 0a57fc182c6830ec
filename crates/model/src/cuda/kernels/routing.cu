// Which experts each token of an MoE layer goes to, whether they are there, and the rows grouped by expert. A token has top_k
// choices; choice c, counted over all tokens, is of token c / top_k.

struct Route {
    const float *logits; // (rows, experts)
    unsigned short *chosen; // (rows, top_k), the most probable first
    float *alpha;           // (rows, top_k): the factor of the expert's output, its probability
    const int *slots;       // (experts): where each expert of the layer is, -1: nowhere; null: nobody asks
    Pass *pass;
    Tile *few;  // groups of at most few_rows rows, in tiles of few_tile, and rests of the others
    Tile *many; // the others, in tiles of many_tile
    int *counts; // how many tiles of both
    u32 *order; // the token of each place
    u32 *to;    // which choice it is; the same as order where a token has one
    int rows;
    int top_k; // at most 32
    int is_normalised; // the factors of a token add up to 1
    int experts;
    int layer;
    int few_rows;
    int few_tile;
    int many_tile;
    int rest_rows; // what is left of a group behind whole tiles is one of few if it is at most so much
};

// A number that grows with a logit. 0 for NaN and for what has no probability at all, which are chosen last.
__device__ __forceinline__ u32 ascending(float logit) {
    u32 bits = __float_as_uint(logit + 0.f); // there is one zero only
    return logit > -INFINITY ? bits ^ (bits >> 31 ? ~0u : 1u << 31) : 0;
}

// The most probable experts of one token, the lowest where two are equal. A warp; lanes share the experts, and lane j keeps
// choice j.
__device__ __forceinline__ void choose(const Route &a, int token) {
    const float *logits = a.logits + u64(token) * a.experts;
    const int NONE = 0x7fffffff;
    int lane = threadIdx.x % 32, expert = 0, own_best;
    u32 taken = 0; // bit i: the expert lane + 32 * i
    u32 most;      // of those of the lane that are left; own_best is which one
    auto look = [&]() {
        most = 0, own_best = NONE;
#pragma unroll 4
        for (int e = lane, i = 0; e < a.experts; e += 32, ++i) {
            u32 own = ascending(logits[e]);
            if (!(taken >> i & 1) && (own > most || own_best == NONE)) most = own, own_best = e;
        }
    };
    look();
    for (int j = 0; j < a.top_k; ++j) {
        u32 highest = __reduce_max_sync(~0u, most);
        int best = __reduce_min_sync(~0u, most == highest ? own_best : NONE);
        if (lane == j) expert = best;
        if (lane == best % 32) {
            taken |= 1u << best / 32;
            look();
        }
        __syncwarp();
    }
    float own = logits[expert], first = __shfl_sync(~0u, own, 0), sum = 0;
    for (int e = lane; e < a.experts; e += 32) sum += expf(logits[e] - first);
    sum = warp_sum(sum);
    float alpha = expf(own - first) / sum;
    if (a.is_normalised) {
        float total = 0;
        for (int j = 0; j < a.top_k; ++j) total += __shfl_sync(~0u, alpha, j);
        alpha /= total;
    }
    if (lane < a.top_k) {
        a.chosen[token * a.top_k + lane] = expert;
        a.alpha[token * a.top_k + lane] = alpha;
        if (a.slots && a.slots[expert] < 0) atomicMin(&a.pass->stop, a.layer);
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

// From which of its rows on a group is in tiles of few.
__device__ __forceinline__ int few_from(const Route &a, int rows) {
    int rest = rows % a.many_tile;
    return rows <= a.few_rows ? 0 : rest <= a.rest_rows ? rows - rest : rows;
}

// Groups of this many rows: how many tiles they make, few ones in the upper half of 20 bits each.
__device__ __forceinline__ u64 tiles_of(const Route &a, int rows) {
    int many = few_from(a, rows), few = rows - many;
    return u64((few + a.few_tile - 1) / a.few_tile) << 20 | u64((many + a.many_tile - 1) / a.many_tile) << 40;
}

// Blocks of so many threads, of which there is one for each expert at least, 1024 at most: order tokens by expert and cut the groups
// into tiles. Each counts all, and writes what is of its share of the experts: places are all over memory, which one multiprocessor
// writes slowly.
__device__ __forceinline__ void group(const Route &a, int threads) {
    __shared__ u32 counts[1024];
    __shared__ u32 taken[1024];
    __shared__ u64 sums[1024];
    __shared__ u64 warps[32];
    int e = threadIdx.x, lane = e % 32;
    counts[e] = 0, taken[e] = 0;
    __syncthreads();
    int choices = a.rows * a.top_k;
#pragma unroll 4
    for (int c = e; c < choices; c += threads) atomicAdd(&counts[a.chosen[c]], 1);
    __syncthreads();
    u64 own = counts[e] + tiles_of(a, counts[e]), sum = own;
    for (int offset = 1; offset < 32; offset <<= 1) {
        u64 before = __shfl_up_sync(~0u, sum, offset);
        if (lane >= offset) sum += before;
    }
    if (lane == 31) warps[e / 32] = sum;
    __syncthreads();
    u64 before_warp = lane < e / 32 ? warps[lane] : 0;
    for (int offset = 16; offset; offset >>= 1) before_warp += __shfl_xor_sync(~0u, before_warp, offset);
    sums[e] = sum += before_warp;
    __syncthreads();
    if (e == threads - 1 && blockIdx.x == 0) a.counts[0] = sum >> 20 & 0xfffff, a.counts[1] = sum >> 40;
    u64 before = sum - own;
    int first = before & 0xfffff, rows = counts[e];
    if (rows > 0 && e % gridDim.x == blockIdx.x) {
        Tile *few = a.few + (before >> 20 & 0xfffff), *many = a.many + (before >> 40);
        int rest = few_from(a, rows);
        for (int done = 0; done < rest; done += a.many_tile)
            *many++ = Tile{a.slots[e], first + done, min(a.many_tile, rest - done), 0};
        for (int done = rest; done < rows; done += a.few_tile)
            *few++ = Tile{a.slots[e], first + done, min(a.few_tile, rows - done), 0};
    }
#pragma unroll 4
    for (int c = e; c < choices; c += threads) {
        int expert = a.chosen[c];
        if (expert % gridDim.x != blockIdx.x) continue;
        u32 place = (expert ? sums[expert - 1] & 0xfffff : 0) + atomicAdd(&taken[expert], 1);
        a.order[place] = c / a.top_k;
        a.to[place] = c;
    }
}

// What choose_experts chose. Blocks of 1024.
extern "C" __global__ void __launch_bounds__(1024) group_rows(Route a) {
    begin();
    if (!route_ended(a)) group(a, 1024);
}

// The same as `group` by one warp, for 32 choices at most, where every group is one tile of few.
__device__ __forceinline__ void group_in_warp(const Route &a) {
    int lane = threadIdx.x, choices = a.rows * a.top_k;
    int expert = lane < choices ? a.chosen[lane] : 1024; // behind all that there are
    int slot = lane < choices ? a.slots[expert] : -1;
    u32 same = __match_any_sync(~0u, expert);
    bool leads = lane < choices && lane == __ffs(same) - 1;
    u32 leaders = __ballot_sync(~0u, leads);
    int place = 0, tile = 0;
#pragma unroll
    for (int j = 0; j < 32; ++j) {
        int other = __shfl_sync(~0u, expert, j);
        place += other < expert || other == expert && j < lane;
        tile += other < expert && leaders >> j & 1;
    }
    if (lane < choices) a.order[place] = lane / a.top_k, a.to[place] = lane;
    if (leads) a.few[tile] = Tile{slot, place, __popc(same), 0};
    if (lane == 0) a.counts[0] = __popc(leaders), a.counts[1] = 0;
}

// Both at once, for few rows. One block.
extern "C" __global__ void __launch_bounds__(1024) choose_and_group(Route a) {
    begin();
    if (route_ended(a)) return;
    for (int token = threadIdx.x / 32; token < a.rows; token += blockDim.x / 32) choose(a, token);
    __syncthreads();
    group(a, blockDim.x);
}

// And for so few that one warp groups them. One block, of a warp for each row.
extern "C" __global__ void __launch_bounds__(1024) choose_and_group_few(Route a) {
    begin();
    if (route_ended(a)) return;
    choose(a, threadIdx.x / 32);
    __syncthreads();
    if (threadIdx.x < 32) group_in_warp(a);
}
