//! How rows of a weight matrix are read where they lie, in each of the formats that [`super::matmul`] multiplies straight out
//! of memory.

use super::{
    block_loads::Scales,
    lanes::{LANES, Lanes},
};
use crate::dtype::StoredDType;

/// How a product reads a row of W: 1 or 2 vectors at a time.
pub(super) trait StoredRows: Copy {
    /// How its values are stored.
    const DTYPE: StoredDType;
    /// How many vectors at a time.
    const VECTORS: usize;
    /// The values from the `at`th of a row on, as float32: a vector of 16, and the next one where there are 2.
    unsafe fn load<L: Lanes>(self, row: *const u8, at: usize) -> [L; 2];
}

/// Float32, as stored or as widened.
#[derive(Clone, Copy)]
pub(super) struct F32;

impl StoredRows for F32 {
    const DTYPE: StoredDType = StoredDType::F32;
    const VECTORS: usize = 1;

    #[inline(always)]
    unsafe fn load<L: Lanes>(self, row: *const u8, at: usize) -> [L; 2] {
        // SAFETY: the caller's.
        unsafe { [L::load(row.cast::<f32>().add(at)), L::splat(0.0)] }
    }
}

/// Bfloat16 as stored, in whole vectors only.
#[derive(Clone, Copy)]
pub(super) struct Bf16;

impl StoredRows for Bf16 {
    const DTYPE: StoredDType = StoredDType::BF16;
    const VECTORS: usize = 1;

    #[inline(always)]
    unsafe fn load<L: Lanes>(self, row: *const u8, at: usize) -> [L; 2] {
        // SAFETY: the caller's.
        unsafe { [L::load_bf16(row.cast::<u16>().add(at)), L::splat(0.0)] }
    }
}

/// Blocks of 8 bits as stored.
#[derive(Clone, Copy)]
pub(super) struct Q8<'a>(pub(super) &'a Scales);

impl StoredRows for Q8<'_> {
    const DTYPE: StoredDType = StoredDType::Q8_0;
    const VECTORS: usize = 2;

    #[inline(always)]
    unsafe fn load<L: Lanes>(self, row: *const u8, at: usize) -> [L; 2] {
        // SAFETY: the caller's; `at` is the first value of a block.
        unsafe { L::load_q8_0(row.add(Self::DTYPE.bytes(at)), self.0) }
    }
}

/// Blocks of 4 bits as stored.
#[derive(Clone, Copy)]
pub(super) struct Q4<'a>(pub(super) &'a Scales);

impl StoredRows for Q4<'_> {
    const DTYPE: StoredDType = StoredDType::Q4_0;
    const VECTORS: usize = 2;

    #[inline(always)]
    unsafe fn load<L: Lanes>(self, row: *const u8, at: usize) -> [L; 2] {
        // SAFETY: the caller's; `at` is the first value of a block.
        unsafe { L::load_q4_0(row.add(Self::DTYPE.bytes(at)), self.0) }
    }
}

/// Writes the values of a row, which is whole vectors or blocks. Panics unless `widened` has as many.
///
/// # Safety
/// The machine must have what `L` needs.
#[inline(always)]
pub(super) unsafe fn widen_row<L: Lanes, W: StoredRows>(rows: W, bytes: &[u8], widened: &mut [f32]) {
    assert_eq!(bytes.len(), W::DTYPE.bytes(widened.len()));
    let mut at = 0;
    while at < widened.len() {
        // SAFETY: both hold what begins at `at`.
        unsafe {
            let [first, second] = rows.load::<L>(bytes.as_ptr(), at);
            first.store(widened.as_mut_ptr().add(at));
            if W::VECTORS == 2 {
                second.store(widened.as_mut_ptr().add(at + LANES));
            }
        }
        at += W::VECTORS * LANES;
    }
}
