// The products of a module in bf16: with plain weights, or with those in FORMAT.

#if BF16

#ifdef FORMAT

typedef BlockRow<FORMAT> OwnRow;
template <bool IS_GATED> using OwnTile = BlockTile<FORMAT, IS_GATED>;

#else

typedef PlainRow OwnRow;
template <bool IS_GATED> using OwnTile = PlainTile<IS_GATED>;

#endif

template <int KIND> __device__ __forceinline__ void few(const Product &a) { few_of<KIND, OwnRow>(a); }
template <int KIND> __device__ __forceinline__ void many(const Product &a) { many_of<KIND, OwnTile<Rows<KIND>::IS_GATED>>(a); }

KINDS(few, few, 128, 1)
KINDS(many, many, 4 * SIDE, 2)

#if WIDE

#ifdef FORMAT
typedef WideBlocks<FORMAT> OwnWide;
#else
typedef WidePlain OwnWide;
#endif

// Of every kind: what differs is done once for a block, and these take long to compile.
extern "C" __global__ void __launch_bounds__(MULTIPLIERS + COPIERS, 1) wide(Product a) { wide_of<false, OwnWide>(a); }
extern "C" __global__ void __launch_bounds__(MULTIPLIERS + COPIERS, 1) wide_gated(Product a) { wide_of<true, OwnWide>(a); }

#endif

#endif
