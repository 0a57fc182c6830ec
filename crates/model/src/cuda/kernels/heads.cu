// What is done to the heads of new rows before they meet: a bias, norms, a limit and turns; then keys and values go into their
// cache.

struct Heads {
    T *rows; // (rows, stride): q, k and v side by side
    const Sequence *sequences;
    const float *bias; // (stride); null: none
    const float *q_norm; // (D_KV), or (heads * D_KV) where the heads of a row are normed together; null: none are normed
    const float *k_norm;
    const float *frequencies; // (D_KV / 2): how far a pair is turned from one position to the next; null: none are turned
    float factor;             // of cosines and sines
    float limit;              // of what is in a head, both ways; infinity: none
    float epsilon;
    int stride;
    int heads;
    int kv_heads;
    int together; // the heads of a row are normed together
    int queries;  // whether anything is done to those
    int block;
    int layers;
    const Pass *pass;
};

const int HEAD_WARPS = 8;
const int PAIRS = (D_KV / 2 + 31) / 32; // of a lane: values i and i + D_KV / 2

__device__ __forceinline__ float head_value(const Heads &a, const T *row, int i) {
    return widen(row[i]) + (a.bias ? a.bias[i] : 0);
}

// The inverse root of the mean square of `width` values from `from` on: all threads of the block.
__device__ __forceinline__ float row_factor(const Heads &a, const T *row, int from, int width) {
    __shared__ float sums[HEAD_WARPS];
    float sum = 0;
    for (int i = threadIdx.x; i < width; i += blockDim.x) {
        float v = head_value(a, row, from + i);
        sum += v * v;
    }
    sum = warp_sum(sum);
    __syncthreads(); // what was summed before is read
    if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = sum;
    __syncthreads();
    sum = 0;
    for (int warp = 0; warp < HEAD_WARPS; ++warp) sum += sums[warp];
    return rsqrtf(sum / width + a.epsilon);
}

// Blocks per sequence and row of it, a warp per head. Of a row whose heads are normed together there is one.
extern "C" __global__ void __launch_bounds__(32 * HEAD_WARPS) place_heads(Heads a) {
    begin();
    if (ended(a.pass, a.layers)) return;
    Sequence s = a.sequences[blockIdx.x];
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, kv_inner = a.kv_heads * D_KV;
    for (int r = blockIdx.y; r < s.rows; r += gridDim.y) {
        T *row = a.rows + u64(s.first_row + r) * a.stride;
        float of_rows[2] = {};
        if (a.together && a.q_norm) {
            of_rows[0] = row_factor(a, row, 0, a.heads * D_KV);
            of_rows[1] = row_factor(a, row, a.heads * D_KV, kv_inner);
            __syncthreads(); // queries are written below
        }
        T *cache = s.cache + (u64(a.block) * s.capacity + s.position + r) * 2 * kv_inner;
        for (int head = (a.queries ? 0 : a.heads) + blockIdx.z * HEAD_WARPS + warp; head < a.heads + 2 * a.kv_heads;
             head += gridDim.z * HEAD_WARPS) {
            bool is_query = head < a.heads, is_value = head >= a.heads + a.kv_heads;
            float low[PAIRS] = {}, high[PAIRS] = {}, sum = 0;
            for (int j = 0; j < PAIRS; ++j) {
                int i = lane + 32 * j;
                if (i >= D_KV / 2) continue;
                low[j] = head_value(a, row, head * D_KV + i), high[j] = head_value(a, row, head * D_KV + i + D_KV / 2);
                sum += low[j] * low[j] + high[j] * high[j];
            }
            const float *norm = is_query ? a.q_norm : a.k_norm;
            if (norm && !is_value) {
                float factor = a.together ? of_rows[!is_query] : rsqrtf(warp_sum(sum) / D_KV + a.epsilon);
                if (a.together) norm += (is_query ? head : head - a.heads) * D_KV;
                for (int j = 0; j < PAIRS; ++j) {
                    int i = lane + 32 * j;
                    if (i >= D_KV / 2) continue;
                    low[j] = low[j] * factor * norm[i], high[j] = high[j] * factor * norm[i + D_KV / 2];
                }
            }
            T *to = is_query ? row + head * D_KV : cache + (head - a.heads) * D_KV;
            for (int j = 0; j < PAIRS; ++j) {
                int i = lane + 32 * j;
                if (i >= D_KV / 2) continue;
                // A NaN stays: it is not limited to a number.
                float x = low[j] > a.limit ? a.limit : low[j] < -a.limit ? -a.limit : low[j];
                float y = high[j] > a.limit ? a.limit : high[j] < -a.limit ? -a.limit : high[j];
                if (a.frequencies && !is_value) {
                    float sine, cosine;
                    sincosf(float(s.position + r) * a.frequencies[i], &sine, &cosine);
                    sine *= a.factor, cosine *= a.factor;
                    float turned = x * cosine - y * sine;
                    y = y * cosine + x * sine, x = turned;
                }
                narrow(x, to + i), narrow(y, to + i + D_KV / 2);
            }
        }
    }
}
