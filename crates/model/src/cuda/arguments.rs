//! The structures that kernels take, field by field as in `kernels/*.cu`. Addresses are the device's; what they name is
//! said there.

use bytemuck::{Pod, Zeroable};

/// `Embed` of rows.cu.
#[derive(Clone, Copy)]
#[repr(C)]
pub(super) struct Embed {
    pub(super) table: u64,
    pub(super) ids: u64,
    pub(super) h: u64,
    pub(super) d: i32,
}

/// `Norm` of rows.cu.
#[derive(Clone, Copy)]
#[repr(C)]
pub(super) struct Norm {
    pub(super) h: u64,
    pub(super) weight: u64,
    pub(super) x: u64,
    pub(super) rows: u64,
    pub(super) epsilon: f32,
    pub(super) scale: f32,
    pub(super) d: i32,
    pub(super) layers: i32,
    pub(super) pass: u64,
}

/// `Add` of rows.cu.
#[derive(Clone, Copy)]
#[repr(C)]
pub(super) struct Add {
    pub(super) h: u64,
    pub(super) y: u64,
    pub(super) count: i32,
}

/// `Fetch` of rows.cu.
#[derive(Clone, Copy)]
#[repr(C)]
pub(super) struct Fetch {
    pub(super) x: u64,
    pub(super) order: u64,
    pub(super) places: u64,
    pub(super) out: u64,
    pub(super) rows: i32,
    pub(super) d: i32,
}

/// `Take` of rows.cu.
#[derive(Clone, Copy)]
#[repr(C)]
pub(super) struct Take {
    pub(super) results: u64,
    pub(super) places: u64,
    pub(super) to: u64,
    pub(super) out: u64,
    pub(super) d: i32,
    pub(super) first: i32,
    pub(super) adds: i32,
}

/// `Combine` of rows.cu.
#[derive(Clone, Copy)]
#[repr(C)]
pub(super) struct Combine {
    pub(super) h: u64,
    pub(super) each: u64,
    pub(super) alpha: u64,
    pub(super) chosen: u64,
    pub(super) top_k: i32,
    pub(super) d: i32,
    pub(super) layers: i32,
    pub(super) pass: u64,
    pub(super) weight: u64,
    pub(super) x: u64,
    pub(super) epsilon: f32,
}

/// `Share` of rows.cu.
#[derive(Clone, Copy)]
#[repr(C)]
pub(super) struct Share {
    pub(super) h: u64,
    pub(super) y: u64,
    pub(super) x: u64,
    pub(super) gate: u64,
    pub(super) d: i32,
    pub(super) layers: i32,
    pub(super) pass: u64,
}

/// `Tile` of product.cu.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub(super) struct Tile {
    pub(super) slot: i32,
    pub(super) first: i32,
    pub(super) rows: i32,
    pub(super) unused: i32,
}

/// `Best` of rows.cu.
#[derive(Clone, Copy)]
#[repr(C)]
pub(super) struct Best {
    pub(super) logits: u64,
    pub(super) tokens: u64,
    pub(super) banned: u64,
    pub(super) vocab: i32,
}

/// `Product` of product.cu.
#[derive(Clone, Copy, Default)]
#[repr(C)]
pub(super) struct Product {
    pub(super) x: u64,
    pub(super) w: u64,
    pub(super) out: u64,
    pub(super) rows: i32,
    pub(super) k: i32,
    pub(super) outputs: i32,
    pub(super) layers: i32,
    pub(super) pass: u64,
    pub(super) tiles: u64,
    pub(super) tile_count: u64,
    pub(super) order: u64,
    pub(super) to: u64,
    pub(super) alpha: u64,
    pub(super) slot_stride: u64,
    pub(super) kind: i32,
}

/// `Kind` of product.cu: what becomes of a product's results.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(i32)]
pub(super) enum Kind {
    /// y
    Store,
    /// relu(y)
    Relu,
    /// silu(gate) * y
    Gate,
    /// out + y
    Add,
    /// y in float32
    Logits,
    /// relu(y), of experts, as the following
    Gather,
    /// silu(gate) * y
    GatherGate,
    /// out\[token\] + alpha\[token\] * y
    Scatter,
    /// y for each choice, in float32
    Each,
}

/// `Route` of routing.cu.
#[derive(Clone, Copy)]
#[repr(C)]
pub(super) struct Route {
    pub(super) logits: u64,
    pub(super) chosen: u64,
    pub(super) alpha: u64,
    pub(super) slots: u64,
    pub(super) pass: u64,
    pub(super) few: u64,
    pub(super) many: u64,
    pub(super) counts: u64,
    pub(super) order: u64,
    pub(super) to: u64,
    pub(super) rows: i32,
    pub(super) top_k: i32,
    pub(super) is_normalised: i32,
    pub(super) experts: i32,
    pub(super) layer: i32,
    pub(super) few_rows: i32,
    pub(super) few_tile: i32,
    pub(super) many_tile: i32,
    pub(super) rest_rows: i32,
}

/// `Sequence` of attention.cu.
#[derive(Clone, Copy, Default, Pod, Zeroable)]
#[repr(C)]
pub(super) struct Sequence {
    pub(super) cache: u64,
    pub(super) cross: u64,
    pub(super) cross_stride: u64,
    pub(super) capacity: i32,
    pub(super) input_rows: i32,
    pub(super) first_row: i32,
    pub(super) rows: i32,
    pub(super) position: i32,
    pub(super) unused: i32,
}

/// `Mean` of mean.cu.
#[derive(Clone, Copy)]
#[repr(C)]
pub(super) struct Mean {
    pub(super) x: u64,
    pub(super) sequences: u64,
    pub(super) out: u64,
    pub(super) d: i32,
}

/// `Attention` of attention.cu.
#[derive(Clone, Copy)]
#[repr(C)]
pub(super) struct Attention {
    pub(super) q: u64,
    pub(super) out: u64,
    pub(super) sequences: u64,
    pub(super) bias: u64,
    pub(super) q_stride: i32,
    pub(super) inner: i32,
    pub(super) kv_inner: i32,
    pub(super) group: i32,
    pub(super) scale: f32,
    pub(super) window: i32,
    pub(super) reach: i32,
    pub(super) block: i32,
    pub(super) layers: i32,
    pub(super) pass: u64,
    pub(super) parts: u64,
    pub(super) runs: i32,
}

/// `Heads` of heads.cu.
#[derive(Clone, Copy, Default)]
#[repr(C)]
pub(super) struct Heads {
    pub(super) rows: u64,
    pub(super) sequences: u64,
    pub(super) bias: u64,
    pub(super) q_norm: u64,
    pub(super) k_norm: u64,
    pub(super) frequencies: u64,
    pub(super) factor: f32,
    pub(super) limit: f32,
    pub(super) epsilon: f32,
    pub(super) stride: i32,
    pub(super) heads: i32,
    pub(super) kv_heads: i32,
    pub(super) together: i32,
    pub(super) queries: i32,
    pub(super) block: i32,
    pub(super) layers: i32,
    pub(super) pass: u64,
}

#[cfg(test)]
mod tests {
    use std::mem::{offset_of, size_of};

    use super::*;

    /// A kernel would read one field for another: these are the sizes and places that a C++ compiler gives.
    #[test]
    fn layouts_are_those_of_the_kernels() {
        assert_eq!((size_of::<Embed>(), size_of::<Norm>(), size_of::<Best>()), (32, 56, 32));
        assert_eq!((size_of::<Add>(), size_of::<Tile>()), (24, 16));
        assert_eq!((size_of::<Fetch>(), offset_of!(Fetch, rows)), (40, 32));
        assert_eq!((size_of::<Take>(), offset_of!(Take, adds)), (48, 40));
        assert_eq!((size_of::<Combine>(), offset_of!(Combine, pass), offset_of!(Combine, epsilon)), (80, 48, 72));
        assert_eq!((size_of::<Share>(), offset_of!(Share, pass)), (48, 40));
        assert_eq!((size_of::<Product>(), offset_of!(Product, pass), offset_of!(Product, kind)), (104, 40, 96));
        assert_eq!((size_of::<Route>(), offset_of!(Route, rows), offset_of!(Route, rest_rows)), (120, 80, 112));
        assert_eq!((size_of::<Mean>(), offset_of!(Mean, d)), (32, 24));
        assert_eq!((size_of::<Sequence>(), offset_of!(Sequence, capacity)), (48, 24));
        assert_eq!((size_of::<Attention>(), offset_of!(Attention, pass), offset_of!(Attention, runs)), (96, 72, 88));
        assert_eq!((size_of::<Heads>(), offset_of!(Heads, factor), offset_of!(Heads, pass)), (96, 48, 88));
    }
}
