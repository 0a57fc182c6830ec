//! How rows of a weight matrix are read where they lie, in each of the formats that [`super::matmul`] multiplies straight out
//! of memory.

use super::{
    block_loads::Scales,
    lanes::{LANES, Lanes},
    super_block_loads::{Factors, q4_k_factors, q4_k_pair, q6_k_factors, q6_k_pair},
};
use crate::{
    dtype::StoredDType,
    super_blocks::{PART, SUPER_BLOCK},
};

/// How many vectors at most are read at a time.
const VECTORS_MAX: usize = 4;

/// How a product reads a row of W: 1, 2 or 4 vectors at a time.
pub(super) trait StoredRows: Copy {
    /// How its values are stored.
    const DTYPE: StoredDType;
    /// How many vectors at a time.
    const VECTORS: usize;
    /// How many values of a row share factors. Whole steps of so many vectors.
    const SHARING: usize = Self::VECTORS * LANES;
    /// What is found once for so many.
    type Factors: Copy;

    /// The factors of the values from the `at`th of a row on.
    unsafe fn factors<L: Lanes>(self, row: *const u8, at: usize) -> Self::Factors;

    /// The values from the `at`th of a row on, as float32: `VECTORS` vectors of 16. The others are nothing.
    unsafe fn load<L: Lanes>(self, row: *const u8, at: usize, factors: &Self::Factors) -> [L; VECTORS_MAX];

    /// Bytes of so many values, or a little less where they are no whole blocks.
    #[inline(always)]
    fn bytes(values: usize) -> usize {
        let (block_values, block_bytes) = const { Self::DTYPE.block() };
        values * block_bytes / block_values
    }
}

/// Vectors that were read, and nothing beside them.
#[inline(always)]
unsafe fn filled<L: Lanes, const N: usize>(read: [L; N]) -> [L; VECTORS_MAX] {
    // SAFETY: the caller's machine.
    let mut vectors = [unsafe { L::splat(0.0) }; VECTORS_MAX];
    let mut v = 0;
    while v < N {
        vectors[v] = read[v];
        v += 1;
    }
    vectors
}

/// Float32, as stored or as widened.
#[derive(Clone, Copy)]
pub(super) struct F32;

impl StoredRows for F32 {
    const DTYPE: StoredDType = StoredDType::F32;
    const VECTORS: usize = 1;

    type Factors = ();

    #[inline(always)]
    unsafe fn factors<L: Lanes>(self, _row: *const u8, _at: usize) {}

    #[inline(always)]
    unsafe fn load<L: Lanes>(self, row: *const u8, at: usize, _: &()) -> [L; VECTORS_MAX] {
        // SAFETY: the caller's.
        unsafe { filled([L::load(row.cast::<f32>().add(at))]) }
    }
}

/// Bfloat16 as stored, in whole vectors only.
#[derive(Clone, Copy)]
pub(super) struct Bf16;

impl StoredRows for Bf16 {
    const DTYPE: StoredDType = StoredDType::BF16;
    const VECTORS: usize = 1;

    type Factors = ();

    #[inline(always)]
    unsafe fn factors<L: Lanes>(self, _row: *const u8, _at: usize) {}

    #[inline(always)]
    unsafe fn load<L: Lanes>(self, row: *const u8, at: usize, _: &()) -> [L; VECTORS_MAX] {
        // SAFETY: the caller's.
        unsafe { filled([L::load_bf16(row.cast::<u16>().add(at))]) }
    }
}

/// Blocks of 8 bits as stored.
#[derive(Clone, Copy)]
pub(super) struct Q8<'a>(pub(super) &'a Scales);

impl StoredRows for Q8<'_> {
    const DTYPE: StoredDType = StoredDType::Q8_0;
    const VECTORS: usize = 2;

    type Factors = ();

    #[inline(always)]
    unsafe fn factors<L: Lanes>(self, _row: *const u8, _at: usize) {}

    #[inline(always)]
    unsafe fn load<L: Lanes>(self, row: *const u8, at: usize, _: &()) -> [L; VECTORS_MAX] {
        // SAFETY: the caller's; `at` is the first value of a block.
        unsafe { filled(L::load_q8_0(row.add(Self::DTYPE.bytes(at)), self.0)) }
    }
}

/// Blocks of 4 bits as stored.
#[derive(Clone, Copy)]
pub(super) struct Q4<'a>(pub(super) &'a Scales);

impl StoredRows for Q4<'_> {
    const DTYPE: StoredDType = StoredDType::Q4_0;
    const VECTORS: usize = 2;

    type Factors = ();

    #[inline(always)]
    unsafe fn factors<L: Lanes>(self, _row: *const u8, _at: usize) {}

    #[inline(always)]
    unsafe fn load<L: Lanes>(self, row: *const u8, at: usize, _: &()) -> [L; VECTORS_MAX] {
        // SAFETY: the caller's; `at` is the first value of a block.
        unsafe { filled(L::load_q4_0(row.add(Self::DTYPE.bytes(at)), self.0)) }
    }
}

/// Super-blocks of 4 bits as stored.
#[derive(Clone, Copy)]
pub(super) struct Q4K<'a>(pub(super) &'a Scales);

impl StoredRows for Q4K<'_> {
    const DTYPE: StoredDType = StoredDType::Q4K;
    const VECTORS: usize = 4;
    const SHARING: usize = SUPER_BLOCK;
    type Factors = Factors;

    #[inline(always)]
    unsafe fn factors<L: Lanes>(self, row: *const u8, at: usize) -> Factors {
        // SAFETY: the caller's; `at` is the first value of a super-block.
        unsafe { q4_k_factors::<L>(row.add(Self::DTYPE.bytes(at)), self.0) }
    }

    #[inline(always)]
    unsafe fn load<L: Lanes>(self, row: *const u8, at: usize, factors: &Factors) -> [L; VECTORS_MAX] {
        // SAFETY: the caller's; `at` is the first value of two parts.
        unsafe { q4_k_pair(row.add(Self::DTYPE.bytes(at)), at % SUPER_BLOCK / (2 * PART), factors) }
    }
}

/// Super-blocks of 6 bits as stored.
#[derive(Clone, Copy)]
pub(super) struct Q6K<'a>(pub(super) &'a Scales);

impl StoredRows for Q6K<'_> {
    const DTYPE: StoredDType = StoredDType::Q6K;
    const VECTORS: usize = 4;
    const SHARING: usize = SUPER_BLOCK;
    type Factors = Factors;

    #[inline(always)]
    unsafe fn factors<L: Lanes>(self, row: *const u8, at: usize) -> Factors {
        // SAFETY: the caller's; `at` is the first value of a super-block.
        unsafe { q6_k_factors::<L>(row.add(Self::DTYPE.bytes(at)), self.0) }
    }

    #[inline(always)]
    unsafe fn load<L: Lanes>(self, row: *const u8, at: usize, factors: &Factors) -> [L; VECTORS_MAX] {
        // SAFETY: the caller's; `at` is the first value of two parts.
        unsafe { q6_k_pair(row.add(Self::DTYPE.bytes(at)), at % SUPER_BLOCK / (2 * PART), factors) }
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
        let factors = unsafe { rows.factors::<L>(bytes.as_ptr(), at) };
        let end = at + W::SHARING;
        while at < end {
            // SAFETY: as above.
            unsafe {
                let vectors = rows.load::<L>(bytes.as_ptr(), at, &factors);
                let mut v = 0;
                while v < W::VECTORS {
                    vectors[v].store(widened.as_mut_ptr().add(at + v * LANES));
                    v += 1;
                }
            }
            at += W::VECTORS * LANES;
        }
    }
}
