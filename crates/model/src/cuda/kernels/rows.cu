// What is done to single rows: embedding, norm, sums, and the best token of a row of logits.

// h[row] = table[ids[row]], a block per row
extern "C" __global__ void embed_rows(Embed a) {
    begin();
    const T *from = a.table + u64(a.ids[blockIdx.x]) * a.d;
    for (int i = threadIdx.x; i < a.d; i += blockDim.x) a.h[u64(blockIdx.x) * a.d + i] = widen(from[i]);
}

struct Norm {
    const float *h;
    const float *weight;
    T *x;
    const u32 *rows; // which rows of h; null: all, in order
    float epsilon;
    float scale; // of the result
    int d;
    int layers;
    const Pass *pass;
};

// The sum of all threads of a block, for each of them, in an order that depends on how many there are.
__device__ __forceinline__ float block_sum(float sum) {
    __shared__ float sums[32];
    int warps = blockDim.x / 32;
    sum = warp_sum(sum);
    if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = sum;
    __syncthreads();
    return warp_sum(threadIdx.x % 32 < warps ? sums[threadIdx.x % 32] : 0.f);
}

// x = w * h / sqrt(mean(h^2) + epsilon) * scale of this block's row, four values a thread up to 4096. `first` are the thread's first of
// h, and `weight` those of w.
__device__ __forceinline__ void norm_row(const float *h, const float *weights, float4 first, float4 weight, T *x, int d, float epsilon, float scale) {
    float sum = 0;
    int own = threadIdx.x * 4, step = blockDim.x * 4;
    for (int i = own; i < d; i += step) {
        float4 v = i == own ? first : wide4(h + i);
        sum += v.x * v.x + v.y * v.y + v.z * v.z + v.w * v.w;
    }
    float factor = rsqrtf(block_sum(sum) / d + epsilon);
    for (int i = own; i < d; i += step) {
        float4 v = i == own ? first : wide4(h + i), w = i == own ? weight : wide4(weights + i);
        narrow4(make_float4(v.x * factor * w.x * scale, v.y * factor * w.y * scale, v.z * factor * w.z * scale,
                            v.w * factor * w.w * scale),
                x + i);
    }
}

// x = norm(h), a block per row
extern "C" __global__ void __launch_bounds__(1024) rms_norm(Norm a) {
    begin();
    if (ended(a.pass, a.layers)) return;
    u64 row = a.rows ? a.rows[blockIdx.x] : blockIdx.x;
    const float *h = a.h + row * a.d;
    float4 first = wide4(h + threadIdx.x * 4), weight = wide4(a.weight + threadIdx.x * 4);
    norm_row(h, a.weight, first, weight, a.x + u64(blockIdx.x) * a.d, a.d, a.epsilon, a.scale);
}

struct Add {
    float *h;
    const float *y;
    int count; // a multiple of 4
};

// h += y, four values a thread
extern "C" __global__ void add_rows(Add a) {
    begin();
    int i = (blockIdx.x * blockDim.x + threadIdx.x) * 4;
    if (i >= a.count) return;
    float4 h = wide4(a.h + i), y = wide4(a.y + i);
    *reinterpret_cast<float4 *>(a.h + i) = make_float4(h.x + y.x, h.y + y.y, h.z + y.z, h.w + y.w);
}

struct Fetch {
    const T *x;       // (rows, d), perhaps of another device
    const u32 *order; // the token of each place, there
    const u32 *places;
    T *out;         // (places, d)
    int rows;
    int d; // a multiple of 8
};

// out[place] = x[order[place]], a block per place
extern "C" __global__ void fetch_rows(Fetch a) {
    begin();
    u32 place = a.places[blockIdx.x];
    // Whatever another process wrote there, nothing beyond its rows is read.
    u32 token = min(a.order[place], u32(a.rows) - 1);
    const T *from = a.x + u64(token) * a.d;
    T *to = a.out + u64(place) * a.d;
    const int step = 16 / sizeof(T);
    for (int i = threadIdx.x * step; i < a.d; i += blockDim.x * step)
        *reinterpret_cast<uint4 *>(to + i) = *reinterpret_cast<const uint4 *>(from + i);
}

struct Take {
    const float *results; // (places, d) from place `first` on, perhaps of another device; null: zeros
    const u32 *places;
    const u32 *to; // which choice each place is
    float *out;    // (choices, d)
    int d;         // a multiple of 4
    int first;
    int adds; // to what is there
};

// out[to[place]] = results[place], or += it, a block per place
extern "C" __global__ void take_rows(Take a) {
    begin();
    u32 place = a.places[blockIdx.x];
    float *to = a.out + u64(a.to[place]) * a.d;
    for (int i = threadIdx.x * 4; i < a.d; i += blockDim.x * 4) {
        float4 y = make_float4(0, 0, 0, 0);
        if (a.results) y = wide4(a.results + u64(place - a.first) * a.d + i);
        if (a.adds) {
            float4 before = wide4(to + i);
            y = make_float4(before.x + y.x, before.y + y.y, before.z + y.z, before.w + y.w);
        }
        *reinterpret_cast<float4 *>(to + i) = y;
    }
}

struct Combine {
    float *h;           // (rows, d)
    const float *each;  // (rows, top_k, d): what experts made of each choice
    const float *alpha; // (rows, top_k)
    const unsigned short *chosen; // (rows, top_k): their experts; null: choices are in the order of these
    int top_k;          // at most 32
    int d;              // a multiple of 128
    int layers;
    const Pass *pass;
    const float *weight; // of the norm that follows; null: none does
    T *x;
    float epsilon;
};

// h += the sum of alpha * each over a row's choices, which are added by ascending expert, as the processor adds: a block per row.
// Then x = norm(h): a kernel less for each block of a model. TOGETHER: how many choices are read before any is added, so that
// nobody waits for one after another.
template <int TOGETHER> __device__ __forceinline__ void combine(const Combine &a) {
    __shared__ int by_expert[32];
    begin();
    if (ended(a.pass, a.layers)) return;
    int first = blockIdx.x * a.top_k, own = threadIdx.x;
    if (own < a.top_k) {
        int rank = own;
        if (a.chosen) {
            rank = 0;
            for (int j = 0; j < a.top_k; ++j) rank += a.chosen[first + j] < a.chosen[first + own];
        }
        by_expert[rank] = first + own;
    }
    __syncthreads();
    float *h = a.h + u64(blockIdx.x) * a.d;
    float4 weight = a.weight ? wide4(a.weight + own * 4) : make_float4(0, 0, 0, 0), own_h = weight;
    for (int i = own * 4; i < a.d; i += blockDim.x * 4) {
        float4 before = wide4(h + i), sum = make_float4(0, 0, 0, 0);
        for (int j = 0; j < a.top_k; j += TOGETHER) {
            float4 ys[TOGETHER];
            float alphas[TOGETHER];
#pragma unroll
            for (int n = 0; n < TOGETHER; ++n) {
                int choice = by_expert[min(j + n, a.top_k - 1)];
                ys[n] = wide4(a.each + u64(choice) * a.d + i), alphas[n] = a.alpha[choice];
            }
#pragma unroll
            for (int n = 0; n < TOGETHER; ++n) {
                if (j + n >= a.top_k) break;
                float4 y = ys[n];
                float alpha = alphas[n];
                // Not fused: on the processor the product is rounded, too.
                sum = make_float4(__fadd_rn(sum.x, __fmul_rn(alpha, y.x)), __fadd_rn(sum.y, __fmul_rn(alpha, y.y)),
                                  __fadd_rn(sum.z, __fmul_rn(alpha, y.z)), __fadd_rn(sum.w, __fmul_rn(alpha, y.w)));
            }
        }
        float4 after = make_float4(before.x + sum.x, before.y + sum.y, before.z + sum.z, before.w + sum.w);
        *reinterpret_cast<float4 *>(h + i) = after;
        if (i == own * 4) own_h = after;
    }
    // A thread reads what it wrote itself.
    if (a.weight) norm_row(h, a.weight, own_h, weight, a.x + u64(blockIdx.x) * a.d, a.d, a.epsilon, 1);
}

// A row waits less the more it reads at once; of many rows, more are on their way at once the fewer registers each takes.
extern "C" __global__ void __launch_bounds__(1024) combine_few_rows(Combine a) { combine<8>(a); }
extern "C" __global__ void __launch_bounds__(1024, 2) combine_rows(Combine a) { combine<4>(a); }

struct Share {
    float *h;
    const float *y;
    const T *x;
    const T *gate; // (d)
    int d;         // a multiple of 4
    int layers;
    const Pass *pass;
};

// h += sigmoid(x . gate) * y, a block of 128 per row
extern "C" __global__ void add_share(Share a) {
    __shared__ float sums[4];
    begin();
    if (ended(a.pass, a.layers)) return;
    u64 row = u64(blockIdx.x) * a.d;
    float sum = 0;
    for (int i = threadIdx.x * 4; i < a.d; i += 512) {
        float4 x = wide4(a.x + row + i), w = wide4(a.gate + i);
        sum += x.x * w.x + x.y * w.y + x.z * w.z + x.w * w.w;
    }
    sum = warp_sum(sum);
    if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = sum;
    __syncthreads();
    float share = 1 / (1 + expf(-(sums[0] + sums[1] + sums[2] + sums[3])));
    for (int i = threadIdx.x; i < a.d; i += 128) a.h[row + i] += share * a.y[row + i];
}

struct Best {
    const float *logits;
    u32 *tokens;
    const u32 *banned; // for each row a token that it cannot be; null: any may be
    int vocab;
};

// tokens[row] = the best of logits[row], the lowest where two are equal, ~0 where none is a number above minus infinity; a
// block of 1024 per row
extern "C" __global__ void best_tokens(Best a) {
    __shared__ float values[32];
    __shared__ int places[32];
    begin();
    const float *logits = a.logits + u64(blockIdx.x) * a.vocab;
    float most = -INFINITY;
    int place = 0x7fffffff, banned = a.banned ? int(a.banned[blockIdx.x]) : -1;
    for (int i = threadIdx.x; i < a.vocab; i += 1024)
        if (logits[i] > most && i != banned) most = logits[i], place = i;
    for (int round = 0; round < 2; ++round) {
        for (int offset = 16; offset; offset >>= 1) {
            float other = __shfl_xor_sync(~0u, most, offset);
            int other_place = __shfl_xor_sync(~0u, place, offset);
            if (other > most || (other == most && other_place < place)) most = other, place = other_place;
        }
        if (round) break;
        if (threadIdx.x % 32 == 0) values[threadIdx.x / 32] = most, places[threadIdx.x / 32] = place;
        __syncthreads();
        most = values[threadIdx.x % 32], place = places[threadIdx.x % 32];
    }
    if (threadIdx.x == 0) a.tokens[blockIdx.x] = place == 0x7fffffff ? ~0u : place;
}
