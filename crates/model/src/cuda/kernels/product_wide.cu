// Products of many rows on Hopper, by its instructions for four warps (`wgmma`): 128 outputs of 128 rows a tile, half of the outputs
// for each of two groups of warps. x lies in shared memory, where all four warps read it once; W goes through registers,
// where integers become bf16. So each byte that comes from the L2 cache is multiplied twice as often as by `many`.
//
// Bits are those of `few` and `many`: the runs of k and the order within them are theirs, and on this device an instruction of four
// warps adds its 16 products as the one of a single warp does, in whatever order they lie (measured: 31 million sums of up to 2,048,
// exponents spread over 80 powers of two). So of every 32 of k the first instruction takes the lower four of each eight, the second
// the upper four. k is a multiple of 256, outputs of 128.

#if BF16 && WIDE

const int WIDE_SIDE = 128, WIDE_STAGE = 64, WIDE_WIDTH = WIDE_SIDE + 4; // rows, k of a stage, floats in a row of sums
const int ROWS_BYTES = WIDE_SIDE * WIDE_STAGE * 2; // of x in a stage
const int MULTIPLIERS = 256, COPIERS = 128;        // threads

// Rows of 64 of k lie as `wgmma` reads them: 128 bytes each, of which every piece of 16 is at its number exclusive-or that of the
// row. Of each 32 of k come first the lower halves of the eights, then the upper.
//
// Where the eight bytes `piece` (of 16) of a row go.
__device__ __forceinline__ int wide_place(int row, int piece) {
    int half = piece % 2, eight = piece / 2 % 4, block = piece / 8;
    return row * 128 + ((block * 4 + half * 2 + eight / 2) ^ row % 8) * 16 + eight % 2 * 8;
}

__device__ __forceinline__ void copy_ahead8(void *to, const void *from) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 8;" ::"r"(u32(__cvta_generic_to_shared(to))), "l"(from));
}

// What `wgmma` is told of 64 rows from `at` on, 32 bytes of each.
__device__ __forceinline__ u64 wide_operand(const void *at) {
    return u64(u32(__cvta_generic_to_shared(at)) >> 4 & 0x3fff) | 1ull << 16 | 64ull << 32 | 1ull << 62;
}

#define FOUR(sums, at) "+f"(sums[at]), "+f"(sums[at + 1]), "+f"(sums[at + 2]), "+f"(sums[at + 3])
#define ALL(sums)                                                                                                      \
    FOUR(sums, 0), FOUR(sums, 4), FOUR(sums, 8), FOUR(sums, 12), FOUR(sums, 16), FOUR(sums, 20), FOUR(sums, 24), FOUR(sums, 28)

// 64 outputs x 64 rows, 16 of k, added to the sums if those are kept. A thread has of every 8 rows what it has after `multiply`.
__device__ __forceinline__ void multiply_wide(float (&sums)[32], const u32 (&w)[4], u64 x, int keep) {
    asm volatile("{\n"
                 ".reg .pred keep;\n"
                 "setp.ne.b32 keep, %37, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 "
                 "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, "
                 "%24, %25, %26, %27, %28, %29, %30, %31}, {%32, %33, %34, %35}, %36, keep, 1, 1, 0;\n"
                 "}\n"
                 : ALL(sums)
                 : "r"(w[0]), "r"(w[1]), "r"(w[2]), "r"(w[3]), "l"(x), "r"(keep));
}

// Waits until at most so many groups of products are under way; the sums are of those that are not.
template <int GROUPS> __device__ __forceinline__ void wait_wide(float (&sums)[32]) {
    asm volatile("wgmma.wait_group.sync.aligned %32;" : ALL(sums) : "n"(GROUPS) : "memory");
}

// Barriers in shared memory: waits for the phase with this parity to be over.
__device__ __forceinline__ void await_phase(const u64 *barrier, u32 parity) {
    asm volatile("{\n"
                 ".reg .pred over;\n"
                 "again:\n"
                 "mbarrier.try_wait.parity.shared::cta.b64 over, [%0], %1;\n"
                 "@!over bra again;\n"
                 "}\n" ::"r"(u32(__cvta_generic_to_shared(barrier))),
                 "r"(parity)
                 : "memory");
}
__device__ __forceinline__ void arrive(const u64 *barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(u32(__cvta_generic_to_shared(barrier))) : "memory");
}
// Arrives when what this thread copies ahead has come.
__device__ __forceinline__ void arrive_with_copies(const u64 *barrier) {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(u32(__cvta_generic_to_shared(barrier))) : "memory");
}

// W as the threads of a group of warps take it: of 16 rows and 32 of k the left operands of two products. `Copy` brings stages to
// shared memory, by COPIERS threads.
struct WidePlain {
    static const int BYTES = ROWS_BYTES;
    static const int STAGES = 6;
    static const bool IS_SCALED = false;
    struct Copy {
        const T *from;
        u64 apart, second; // from 8 rows to the next, from the first 64 to the second
        int to;

        // From output o on; `second` is from the first 64 rows to the others, of `rows`.
        __device__ Copy(const Product &a, const void *w, int o, u64 second, int, int thread)
            : from(static_cast<const T *>(w) + u64(o + thread / 16) * a.k + thread % 16 * 4), apart(u64(8) * a.k),
              second(second * a.k), to(wide_place(thread / 16, thread % 16)) {}
        __device__ __forceinline__ void next(unsigned char *stage) {
#pragma unroll
            for (int i = 0; i < 16; ++i) copy_ahead8(stage + to + i * 8 * 128, from + i / 8 * second + i % 8 * apart);
            from += WIDE_STAGE;
        }
    };
    static __device__ __forceinline__ void weights(const unsigned char *stage, int block, u32 (&w)[2][4]) {
        int row = threadIdx.x / 32 * 16 + threadIdx.x % 16;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const unsigned char *at = stage + row * 128 + ((block * 4 + half * 2 + threadIdx.x % 32 / 16) ^ row % 8) * 16;
            asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                         : "=r"(w[half][0]), "=r"(w[half][1]), "=r"(w[half][2]), "=r"(w[half][3])
                         : "r"(u32(__cvta_generic_to_shared(at))));
        }
    }
    static __device__ float scale(const unsigned char *, int, int) { return 1; }
};

// Where stages are, and who waits for them: `full` until they have come, `empty` until they are multiplied.
template <typename W> struct WideStages {
    static const int BYTES = ROWS_BYTES + W::BYTES;
    unsigned char *memory;
    u64 *full, *empty;
    int at, parity;

    __device__ WideStages(unsigned char *memory)
        : memory(memory), full(reinterpret_cast<u64 *>(memory + W::STAGES * BYTES)), empty(full + W::STAGES), at(0), parity(0) {}
    __device__ void begin() {
        if (threadIdx.x < W::STAGES) {
            asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(u32(__cvta_generic_to_shared(full + threadIdx.x))), "n"(COPIERS));
            asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(u32(__cvta_generic_to_shared(empty + threadIdx.x))), "n"(MULTIPLIERS / 32));
        }
        __syncthreads();
    }
    __device__ unsigned char *own() const { return memory + at * BYTES; }
    __device__ void next() {
        if (++at == W::STAGES) at = 0, parity ^= 1;
    }
};

// What COPIERS threads do: x and W, stage by stage.
template <bool IS_GATED, typename W, int CHUNKS>
__device__ __forceinline__ void wide_copies(const Product &a, const BlockRows &rows, int o, WideStages<W> &stages) {
    int thread = threadIdx.x - MULTIPLIERS;
    typename W::Copy w(a, rows.w, o, IS_GATED ? a.outputs : WIDE_SIDE / 2, IS_GATED ? 2 * a.outputs : a.outputs, thread);
    const unsigned char *x = static_cast<const unsigned char *>(a.x) + thread % 16 * 8;
    u32 rows_at[CHUNKS * 8];
#pragma unroll
    for (int i = 0; i < CHUNKS * 8; ++i) rows_at[i] = rows.input(a, a.kind, thread / 16 + i * 8) * a.k * sizeof(T);
    int x_to = wide_place(thread / 16, thread % 16);
    for (int k = 0; k < a.k; k += WIDE_STAGE) {
        await_phase(stages.empty + stages.at, stages.parity ^ 1);
        unsigned char *stage = stages.own();
#pragma unroll
        for (int i = 0; i < CHUNKS * 8; ++i) copy_ahead8(stage + x_to + i * 8 * 128, x + rows_at[i]);
        w.next(stage + ROWS_BYTES);
        arrive_with_copies(stages.full + stages.at);
        x += WIDE_STAGE * sizeof(T);
        stages.next();
    }
}

// What becomes of the sums (row, output) of 32 rows from `from` on: a thread puts four outputs of some of them.
template <int KIND> __device__ __forceinline__ void put_wide(const Product &a, const BlockRows &own, int from, int o, const float *sums) {
    Rows<KIND> rows;
    static_cast<BlockRows &>(rows) = own;
    const bool IS_GATED = Rows<KIND>::IS_GATED;
    const int ACROSS = IS_GATED ? 16 : 32, DOWN = MULTIPLIERS / ACROSS, EACH_PUTS = 32 / DOWN; // threads of a row, rows at a time
    int at = threadIdx.x % ACROSS * 4, first = threadIdx.x / ACROSS, to[EACH_PUTS];
    float4 before[EACH_PUTS];
#pragma unroll
    for (int i = 0; i < EACH_PUTS; ++i) {
        int r = from + first + i * DOWN;
        if (r < rows.count) to[i] = rows.output(a, r), before[i] = rows.before(a, to[i], o + at);
    }
#pragma unroll
    for (int i = 0; i < EACH_PUTS; ++i) {
        if (from + first + i * DOWN >= rows.count) continue;
        const float *own = sums + (first + i * DOWN) * WIDE_WIDTH + at;
        float4 y = wide4(own);
        if (IS_GATED) y = gated(y, wide4(own + WIDE_SIDE / 2));
        rows.put(a, to[i], o + at, y, before[i]);
    }
}

template <bool IS_GATED>
__device__ __forceinline__ void put_wide_kind(const Product &a, const BlockRows &rows, int from, int o, const float *sums) {
    if (IS_GATED) return a.kind == GATE ? put_wide<GATE>(a, rows, from, o, sums) : put_wide<GATHER_GATE>(a, rows, from, o, sums);
    switch (a.kind) {
    case STORE: return put_wide<STORE>(a, rows, from, o, sums);
    case RELU: return put_wide<RELU>(a, rows, from, o, sums);
    case ADD: return put_wide<ADD>(a, rows, from, o, sums);
    case LOGITS: return put_wide<LOGITS>(a, rows, from, o, sums);
    case GATHER: return put_wide<GATHER>(a, rows, from, o, sums);
    case SCATTER: return put_wide<SCATTER>(a, rows, from, o, sums);
    case EACH: return put_wide<EACH>(a, rows, from, o, sums);
    }
}

__device__ __forceinline__ void meet_multipliers() { asm volatile("bar.sync 1, %0;" ::"n"(MULTIPLIERS) : "memory"); }

// What MULTIPLIERS threads do: the sums of CHUNKS * 64 rows.
template <bool IS_GATED, typename W, int CHUNKS>
__device__ __forceinline__ void wide_sums(const Product &a, const BlockRows &rows, int o, WideStages<W> &stages, float *partial) {
    // -0 changes no first summand.
    float total[CHUNKS][32], sums[CHUNKS][32], own[CHUNKS][32];
#pragma unroll
    for (int c = 0; c < CHUNKS; ++c)
#pragma unroll
        for (int i = 0; i < 32; ++i) total[c][i] = -0.f, sums[c][i] = 0;
    u32 left[2][2][4];
    auto await = [&]() {
        await_phase(stages.full + stages.at, stages.parity);
        asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); // what copies wrote, `wgmma` reads
    };
    auto release = [&](int at) {
        __syncwarp();
        if (threadIdx.x % 32 == 0) arrive(stages.empty + at);
    };
    await();
    W::weights(stages.own() + ROWS_BYTES, 0, left[0]);
    int steps = a.k / WIDE_STAGE, run = steps / 4, before = -1;
    for (int step = 0; step < steps; step += run) {
        for (int i = 0; i < run; ++i) {
            const unsigned char *stage = stages.own();
            int at = stages.at;
#pragma unroll
            for (int block = 0; block < 2; ++block) {
                auto multiply_rows = [&](float (&into)[32], int c, int keep) {
                    const unsigned char *x = stage + c * 64 * 128 + block * 64;
                    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
                    multiply_wide(into, left[block][0], wide_operand(x), keep);
                    multiply_wide(into, left[block][1], wide_operand(x + 32), 1);
                    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
                };
#pragma unroll
                for (int c = 0; c < CHUNKS; ++c) {
                    if (W::IS_SCALED) multiply_rows(own[c], c, 0);
                    else multiply_rows(sums[c], c, block | i);
                }
                float scales[2] = {W::scale(stage + ROWS_BYTES, block, 0), W::scale(stage + ROWS_BYTES, block, 8)};
                if (!W::IS_SCALED) {
#pragma unroll
                    for (int c = 0; c < CHUNKS; ++c) wait_wide<CHUNKS>(sums[c]);
                    if (block == 0 && before >= 0) release(before);
                }
                if (block) {
                    stages.next();
                    if (step + i + 1 < steps) await();
                }
                W::weights(stages.own() + ROWS_BYTES, 1 - block, left[1 - block]);
                if (W::IS_SCALED) {
                    auto take = [&](int c) {
#pragma unroll
                        for (int i = 0; i < 32; ++i) sums[c][i] = fmaf(scales[i / 2 % 2], own[c][i], sums[c][i]);
                        asm volatile("" : ALL(sums[c])); // here, not later
                    };
                    if (CHUNKS == 2) wait_wide<1>(own[0]), take(0);
                    wait_wide<0>(own[CHUNKS - 1]);
                    if (block) release(at);
                    take(CHUNKS - 1);
                }
            }
            before = at;
        }
#pragma unroll
        for (int c = 0; c < CHUNKS; ++c) {
            if (!W::IS_SCALED) wait_wide<0>(sums[c]);
#pragma unroll
            for (int i = 0; i < 32; ++i) {
                total[c][i] += sums[c][i];
                if (W::IS_SCALED) sums[c][i] = 0;
            }
        }
    }
    if (!W::IS_SCALED) release(before);
    // 32 rows at a time meet in shared memory: what is copied ahead needs the room.
    int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll 1
    for (int from = 0; from < rows.count; from += 32) {
#pragma unroll
        for (int c = 0; c < CHUNKS; ++c)
#pragma unroll
            for (int i = 0; i < 32; ++i)
                if (c * 2 + i / 16 == from / 32)
                    partial[(i % 16 / 4 * 8 + t * 2 + i % 2) * WIDE_WIDTH + threadIdx.x / 32 * 16 + g + i / 2 % 2 * 8] = total[c][i];
        meet_multipliers();
        put_wide_kind<IS_GATED>(a, rows, from, o, partial);
        meet_multipliers();
    }
}

// A block for each multiprocessor, which makes tiles until there are none: those who copy go ahead to the next one while the sums
// of this one are written.
template <bool IS_GATED, typename W> __device__ __forceinline__ void wide_of(const Product &a) {
    extern __shared__ __align__(1024) unsigned char wide_memory[]; // sums of 32 rows, stages, barriers
    const int SUMS_BYTES = (32 * WIDE_WIDTH * 4 + 1023) / 1024 * 1024;
    static_assert(SUMS_BYTES + W::STAGES * (WideStages<W>::BYTES + 16) <= WIDE_SHARED_BYTES, "stages need more room");
    begin();
    if (ended(a.pass, a.layers)) return;
    float *partial = reinterpret_cast<float *>(wide_memory);
    WideStages<W> stages(wide_memory + SUMS_BYTES);
    stages.begin();
    const int OUTPUTS = IS_GATED ? WIDE_SIDE / 2 : WIDE_SIDE, across = a.outputs / OUTPUTS;
    int count = across * BlockRows::tiles(a, a.kind, WIDE_SIDE);
    BlockRows rows;
    if (threadIdx.x >= MULTIPLIERS) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
        for (int at = blockIdx.x; at < count; at += gridDim.x) {
            rows.take(a, a.kind, WIDE_SIDE, at / across);
            int o = at % across * OUTPUTS;
            if (rows.count <= 64) wide_copies<IS_GATED, W, 1>(a, rows, o, stages);
            else wide_copies<IS_GATED, W, 2>(a, rows, o, stages);
        }
        asm volatile("cp.async.wait_all;");
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
        for (int at = blockIdx.x; at < count; at += gridDim.x) {
            rows.take(a, a.kind, WIDE_SIDE, at / across);
            int o = at % across * OUTPUTS;
            if (rows.count <= 64) wide_sums<IS_GATED, W, 1>(a, rows, o, stages, partial);
            else wide_sums<IS_GATED, W, 2>(a, rows, o, stages, partial);
        }
    }
}

#endif
