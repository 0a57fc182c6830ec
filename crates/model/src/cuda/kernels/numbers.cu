// Number types, the guard of a pass, and reductions. First of the files that `kernels.rs` puts together to a module; BF16, D_KV and
// MULTIPROCESSORS are defined by it. No header is included: NVRTC needs no path to any.
//
// Invariant of every kernel: a row is computed by itself in an order that depends on no other row and on nobody's
// number of rows, so its bits are the same in any batch.

typedef unsigned short bf16;
typedef unsigned int u32;
typedef unsigned long long u64;

#if BF16
typedef bf16 T; // what weights and activations are stored in
#else
typedef float T;
#endif

__device__ __forceinline__ float widen(bf16 value) { return __uint_as_float(u32(value) << 16); }
__device__ __forceinline__ float widen(float value) { return value; }

__device__ __forceinline__ void narrow(float value, bf16 *to) {
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(*to) : "f"(value));
}
__device__ __forceinline__ void narrow(float value, float *to) { *to = value; }

// Two neighbours in one register.
__device__ __forceinline__ u32 pair(float low, float high) {
    u32 two;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(two) : "f"(high), "f"(low));
    return two;
}

// Four neighbours, at a place that they are aligned to.
__device__ __forceinline__ void narrow4(float4 v, bf16 *to) {
    *reinterpret_cast<uint2 *>(to) = make_uint2(pair(v.x, v.y), pair(v.z, v.w));
}
__device__ __forceinline__ void narrow4(float4 v, float *to) { *reinterpret_cast<float4 *>(to) = v; }

__device__ __forceinline__ float relu(float y) { return y < 0 ? 0.f : y; } // a NaN stays

// silu(gate) * up, with silu(x) = x / (1 + e^-x)
__device__ __forceinline__ float gated(float gate, float up) { return gate / (1 + expf(-gate)) * up; }
__device__ __forceinline__ float4 gated(float4 gate, float4 up) {
    return make_float4(gated(gate.x, up.x), gated(gate.y, up.y), gated(gate.z, up.z), gated(gate.w, up.w));
}

// Four neighbours as float.
__device__ __forceinline__ float4 wide4(const float *from) { return *reinterpret_cast<const float4 *>(from); }
__device__ __forceinline__ float4 wide4(const bf16 *from) {
    uint2 two = *reinterpret_cast<const uint2 *>(from);
    return make_float4(__uint_as_float(two.x << 16), __uint_as_float(two.x & 0xffff0000u),
                       __uint_as_float(two.y << 16), __uint_as_float(two.y & 0xffff0000u));
}

// 16 bytes of a weight, which nobody reads again soon.
__device__ __forceinline__ uint4 load_streaming(const void *from) {
    uint4 v;
    asm("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
        : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
        : "l"(from));
    return v;
}

// Comes first in every kernel. Kernels of a stream overlap: one may be brought onto the device while the one before it still
// runs, and waits here until all of that is written. A kernel that leaves multiprocessors free has the next one brought at once;
// beside a larger one it would only take room.
__device__ __forceinline__ void begin() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
    if (gridDim.x * gridDim.y * gridDim.z <= MULTIPROCESSORS) asm volatile("griddepcontrol.launch_dependents;");
#endif
}

// Where a pass through the layers stands. `stop` is the first MoE layer of which an expert was missing.
struct Pass {
    int stop;
};

// Whether the pass has ended before an operation that follows `layers` MoE layers. A pass that cannot end early
// has no guard.
__device__ __forceinline__ bool ended(const Pass *pass, int layers) { return pass && pass->stop < layers; }

// What embeds: the embedding of a model in the rows of its weights, or in blocks.
struct Embed {
    const T *table;
    const u32 *ids;
    float *h;
    int d;
};

__device__ __forceinline__ float warp_sum(float value) {
    for (int offset = 16; offset; offset >>= 1) value += __shfl_xor_sync(~0u, value, offset);
    return value;
}
__device__ __forceinline__ float warp_max(float value) {
    for (int offset = 16; offset; offset >>= 1) value = fmaxf(value, __shfl_xor_sync(~0u, value, offset));
    return value;
}
