// What is done to single rows: embedding, norm, a sum, and the best token of a row of logits.

struct Embed {
    const T *table;
    const u32 *ids;
    float *h;
    int d;
};

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

// x = w * h / sqrt(mean(h^2) + epsilon) * scale, a block of 128 per row
extern "C" __global__ void rms_norm(Norm a) {
    __shared__ float sums[4];
    begin();
    if (ended(a.pass, a.layers)) return;
    const float *h = a.h + u64(a.rows ? a.rows[blockIdx.x] : blockIdx.x) * a.d;
    float sum = 0;
    for (int i = threadIdx.x * 4; i < a.d; i += 512) {
        float4 v = wide4(h + i);
        sum += v.x * v.x + v.y * v.y + v.z * v.z + v.w * v.w;
    }
    sum = warp_sum(sum);
    if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = sum;
    __syncthreads();
    float factor = rsqrtf((sums[0] + sums[1] + sums[2] + sums[3]) / a.d + a.epsilon);
    for (int i = threadIdx.x; i < a.d; i += 128)
        narrow(h[i] * factor * a.weight[i] * a.scale, a.x + u64(blockIdx.x) * a.d + i);
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
    T *out;         // (rows, d) by place
    float *results; // (rows, d) by place: what is summed from 0
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
    float *sums = a.results + u64(place) * a.d;
    for (int i = threadIdx.x * 4; i < a.d; i += blockDim.x * 4)
        *reinterpret_cast<float4 *>(sums + i) = make_float4(0, 0, 0, 0);
}

struct Take {
    const float *results; // (rows, d) by place, perhaps of another device; null: zeros
    const u32 *places;
    const u32 *order;
    const float *alpha; // of each token
    float *out;         // (rows, d) by token
    int d;              // a multiple of 4
};

// out[token] = alpha[token] * results[place], a block per place
extern "C" __global__ void take_rows(Take a) {
    begin();
    u32 place = a.places[blockIdx.x], token = a.order[place];
    float alpha = a.alpha[token];
    float *to = a.out + u64(token) * a.d;
    for (int i = threadIdx.x * 4; i < a.d; i += blockDim.x * 4) {
        float4 y = make_float4(0, 0, 0, 0);
        if (a.results) {
            y = wide4(a.results + u64(place) * a.d + i);
            y = make_float4(__fmul_rn(alpha, y.x), __fmul_rn(alpha, y.y), __fmul_rn(alpha, y.z), __fmul_rn(alpha, y.w));
        }
        *reinterpret_cast<float4 *>(to + i) = y;
    }
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
