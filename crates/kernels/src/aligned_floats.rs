//! Memory for floats that begins where a vector does, and so a cache line.

use bytemuck::{Pod, Zeroable};

use super::lanes::LANES;

/// One vector.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C, align(64))]
struct Vector([f32; LANES]);

/// Memory that is kept from use to use.
#[derive(Default)]
pub(super) struct AlignedFloats(Vec<Vector>);

impl AlignedFloats {
    /// Room for rows of `width` floats, a multiple of a vector's; what is in it is left over.
    pub(super) fn rows(&mut self, rows: usize, width: usize) -> &mut [f32] {
        let vectors = rows * width / LANES;
        if self.0.len() < vectors {
            self.0.resize(vectors, Vector::zeroed());
        }
        bytemuck::cast_slice_mut(&mut self.0[..vectors])
    }
}
