// y = x W^T: of a dense layer, or of the experts of an MoE layer, each with the rows that chose it. What is read
// through which rows and where the results go is the same for all ways to multiply, which follow in product_*.cu.

// A run of rows for one matrix. `first` is a place in the order of the groups.
struct Tile {
    int slot;
    int first;
    int rows;
    int unused;
};

struct Product {
    const void *x;
    const void *w; // (outputs, k), of a gated product (2 * outputs, k), the gate first; of experts: slot 0's
    void *out;     // (rows, outputs)
    int rows;
    int k;
    int outputs;
    int layers; // MoE layers before this operation
    const Pass *pass;
    // Experts only.
    const Tile *tiles;
    const int *tile_count;
    const u32 *order;   // the token of each place
    const u32 *to;      // which choice each place is, counted over all tokens
    const float *alpha; // of each choice
    u64 slot_stride;    // in bytes
    int kind;           // a `Kind`, for kernels of every kind
};

// What becomes of a result. Of experts are GATHER and GATHER_GATE (x by token, result by place), and the ways back: SCATTER to
// tokens that have one choice each, EACH to every choice by itself.
enum Kind { STORE, RELU, GATE, ADD, LOGITS, GATHER, GATHER_GATE, SCATTER, EACH };

// The rows of a block, and the matrix that they are multiplied with.
struct BlockRows {
    int first, count;
    const void *w;

    // Tiles of `tile` rows at most.
    static __device__ __forceinline__ int tiles(const Product &a, int kind, int tile) {
        return kind >= GATHER ? *a.tile_count : (a.rows + tile - 1) / tile;
    }

    // Takes one of them.
    __device__ __forceinline__ void take(const Product &a, int kind, int tile, int index) {
        if (kind >= GATHER) {
            Tile own = a.tiles[index];
            first = own.first, count = own.rows;
            w = static_cast<const unsigned char *>(a.w) + u64(own.slot) * a.slot_stride;
        } else {
            first = index * tile, count = min(tile, a.rows - first);
            w = a.w;
        }
    }

    // The row of x that is row r of this block; beyond the end the last one, whose result nobody takes.
    __device__ __forceinline__ int input(const Product &a, int kind, int r) const {
        int place = first + min(r, count - 1);
        return kind == GATHER || kind == GATHER_GATE ? a.order[place] : place;
    }
};

template <int KIND> struct Rows : BlockRows {
    // Half of the rows of W that a block multiplies are of the gate, half of what it gates.
    static const bool IS_GATED = KIND == GATE || KIND == GATHER_GATE;

    // Waits for the kernel before. False: the pass has ended.
    static __device__ __forceinline__ bool start(const Product &a) {
        begin();
        return !ended(a.pass, a.layers);
    }
    // Those of this block, `tile` at most. False: none are left.
    __device__ __forceinline__ bool find(const Product &a, int tile) {
        bool goes_on = start(a);
        // Of many blocks most may be left without rows, and are gone sooner if they ask for nothing else. Few ask for all that is
        // read here at once: there is a tile for each, whether or not it is one of these rows.
        if (gridDim.y > 64 && int(blockIdx.y) >= tiles(a, KIND, tile)) return false;
        bool is_there = goes_on & int(blockIdx.y) < tiles(a, KIND, tile);
        take(a, KIND, tile, blockIdx.y);
        return is_there;
    }
    __device__ __forceinline__ int input(const Product &a, int r) const { return BlockRows::input(a, KIND, r); }

    // The row that the results of row r of this block go to.
    __device__ int output(const Product &a, int r) const {
        return KIND == SCATTER || KIND == EACH ? a.to[first + r] : first + r;
    }

    // What four results of that row, from output o on, are added to. Read for several rows before any is written, so that
    // nobody waits for one after another.
    __device__ float4 before(const Product &a, int row, int o) const {
        if (KIND != ADD && KIND != SCATTER) return make_float4(0, 0, 0, 0);
        return wide4(static_cast<const float *>(a.out) + u64(row) * a.outputs + o);
    }

    __device__ void put(const Product &a, int row, int o, float4 y, float4 before) const {
        u64 at = u64(row) * a.outputs + o;
        if (KIND == STORE || IS_GATED) narrow4(y, static_cast<T *>(a.out) + at);
        if (KIND == RELU || KIND == GATHER) narrow4(make_float4(relu(y.x), relu(y.y), relu(y.z), relu(y.w)), static_cast<T *>(a.out) + at);
        if (KIND == ADD) y = make_float4(before.x + y.x, before.y + y.y, before.z + y.z, before.w + y.w);
        if (KIND == SCATTER) {
            float alpha = a.alpha[row];
            // Not fused: where experts are elsewhere, the product comes rounded, too.
            y = make_float4(__fadd_rn(before.x, __fmul_rn(alpha, y.x)), __fadd_rn(before.y, __fmul_rn(alpha, y.y)),
                            __fadd_rn(before.z, __fmul_rn(alpha, y.z)), __fadd_rn(before.w, __fmul_rn(alpha, y.w)));
        }
        if (KIND == ADD || KIND == LOGITS || KIND == SCATTER || KIND == EACH)
            *reinterpret_cast<float4 *>(static_cast<float *>(a.out) + at) = y;
    }

    // Two results of a gated product.
    __device__ void put_gated(const Product &a, int row, int o, float2 y) const {
        T *to = static_cast<T *>(a.out) + u64(row) * a.outputs + o;
        narrow(y.x, to), narrow(y.y, to + 1);
    }
};

// One way to multiply, for every kind: threads of a block, and blocks a multiprocessor must hold.
#define KIND_OF(NAME, BODY, KIND, THREADS, BLOCKS)                                                                     \
    extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) NAME(Product a) { BODY<KIND>(a); }
#define EXPERT_KINDS(NAME, BODY, THREADS, BLOCKS)                                                                      \
    KIND_OF(NAME##_gather, BODY, GATHER, THREADS, BLOCKS)                                                              \
    KIND_OF(NAME##_scatter, BODY, SCATTER, THREADS, BLOCKS)                                                            \
    KIND_OF(NAME##_each, BODY, EACH, THREADS, BLOCKS)
#define KINDS(NAME, BODY, THREADS, BLOCKS)                                                                             \
    KIND_OF(NAME##_store, BODY, STORE, THREADS, BLOCKS)                                                                \
    KIND_OF(NAME##_relu, BODY, RELU, THREADS, BLOCKS)                                                                  \
    KIND_OF(NAME##_gate, BODY, GATE, THREADS, BLOCKS)                                                                  \
    KIND_OF(NAME##_gather_gate, BODY, GATHER_GATE, THREADS, BLOCKS)                                                    \
    KIND_OF(NAME##_add, BODY, ADD, THREADS, BLOCKS)                                                                    \
    KIND_OF(NAME##_logits, BODY, LOGITS, THREADS, BLOCKS)                                                              \
    EXPERT_KINDS(NAME, BODY, THREADS, BLOCKS)
