//! How rows of a weight matrix are read where they lie, in each of the formats that [`super::matmul`] multiplies straight out
//! of memory.

use super::lanes::{LANES, Lanes};
use crate::dtype::StoredDType;

/// How a product reads a row of W: 1 or 2 vectors at a time.
pub(super) trait StoredRows {
    /// So many.
    const VECTORS: usize;
    /// Bytes of a row of `k` values.
    fn row_bytes(k: usize) -> usize;
    /// The values from the `at`th of a row on, as float32: a vector of 16, and the next one where there are 2.
    unsafe fn load<L: Lanes>(row: *const u8, at: usize) -> [L; 2];
}

/// Float32, as stored or as widened.
pub(super) struct F32;

impl StoredRows for F32 {
    const VECTORS: usize = 1;

    #[inline(always)]
    fn row_bytes(k: usize) -> usize {
        StoredDType::F32.bytes(k)
    }

    #[inline(always)]
    unsafe fn load<L: Lanes>(row: *const u8, at: usize) -> [L; 2] {
        // SAFETY: the caller's.
        unsafe { [L::load(row.cast::<f32>().add(at)), L::splat(0.0)] }
    }
}

/// Bfloat16 as stored, in whole vectors only.
pub(super) struct Bf16;

impl StoredRows for Bf16 {
    const VECTORS: usize = 1;

    #[inline(always)]
    fn row_bytes(k: usize) -> usize {
        StoredDType::BF16.bytes(k)
    }

    #[inline(always)]
    unsafe fn load<L: Lanes>(row: *const u8, at: usize) -> [L; 2] {
        // SAFETY: the caller's.
        unsafe { [L::load_bf16(row.cast::<u16>().add(at)), L::splat(0.0)] }
    }
}

/// Blocks of 8 bits as stored.
pub(super) struct Q8;

impl StoredRows for Q8 {
    const VECTORS: usize = 2;

    #[inline(always)]
    fn row_bytes(k: usize) -> usize {
        StoredDType::Q8_0.bytes(k)
    }

    #[inline(always)]
    unsafe fn load<L: Lanes>(row: *const u8, at: usize) -> [L; 2] {
        // SAFETY: the caller's; `at` is the first value of a block.
        unsafe { L::load_q8_0(row.add(Self::row_bytes(at))) }
    }
}

/// Blocks of 4 bits as stored.
pub(super) struct Q4;

impl StoredRows for Q4 {
    const VECTORS: usize = 2;

    #[inline(always)]
    fn row_bytes(k: usize) -> usize {
        StoredDType::Q4_0.bytes(k)
    }

    #[inline(always)]
    unsafe fn load<L: Lanes>(row: *const u8, at: usize) -> [L; 2] {
        // SAFETY: the caller's; `at` is the first value of a block.
        unsafe { L::load_q4_0(row.add(Self::row_bytes(at))) }
    }
}

/// Writes the values of whole blocks. Panics unless `widened` has as many.
#[inline(always)]
pub(super) unsafe fn widen_blocks<L: Lanes, W: StoredRows>(bytes: &[u8], widened: &mut [f32]) {
    assert_eq!(bytes.len(), W::row_bytes(widened.len()));
    let mut at = 0;
    while at < widened.len() {
        // SAFETY: both hold the block that begins at `at`.
        unsafe {
            let [first, second] = W::load::<L>(bytes.as_ptr(), at);
            first.store(widened.as_mut_ptr().add(at));
            second.store(widened.as_mut_ptr().add(at + LANES));
        }
        at += 2 * LANES;
    }
}
