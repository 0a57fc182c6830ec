//! How rows of a weight matrix are read where they lie, in each of the formats that [`super::matmul`] multiplies straight out
//! of memory.

use super::{
    block_loads::Scales,
    lanes::{LANES, Lanes},
    super_block_loads::{Factors, q4_k_factors, q4_k_pair, q5_k_pair, q6_k_factors, q6_k_pair},
};
use crate::{
    dtype::StoredDType,
    fifth_bit::{q4_1, q5_0, q5_1},
    float8::F8_SCALE_BYTES,
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
    /// Whether it lies in the first-level cache already, where nothing need be asked for ahead.
    const IS_NEAR: bool = false;
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

/// Float32, as stored, or NEAR: as it is used over and over.
#[derive(Clone, Copy)]
pub(super) struct F32<const NEAR: bool>;

impl<const NEAR: bool> StoredRows for F32<NEAR> {
    const DTYPE: StoredDType = StoredDType::F32;
    const VECTORS: usize = 1;
    const IS_NEAR: bool = NEAR;

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

/// Blocks of 5 bits as stored.
#[derive(Clone, Copy)]
struct Q5<'a>(&'a Scales);

impl StoredRows for Q5<'_> {
    const DTYPE: StoredDType = StoredDType::Q5_0;
    const VECTORS: usize = 2;

    type Factors = ();

    #[inline(always)]
    unsafe fn factors<L: Lanes>(self, _row: *const u8, _at: usize) {}

    #[inline(always)]
    unsafe fn load<L: Lanes>(self, row: *const u8, at: usize, _: &()) -> [L; VECTORS_MAX] {
        // SAFETY: the caller's; `at` is the first value of a block.
        unsafe {
            let block = row.add(Self::DTYPE.bytes(at));
            let integers = L::load_five_bits(block.add(q5_0::HALVES_AT), fifths(block.add(q5_0::FIFTHS_AT)));
            let (zero, scale) = (L::splat(-f32::from(q5_0::ZERO)), L::splat(self.0.at(block)));
            // A product with 0 added has its bits, but for a 0 below 0: that needs one that is below 0, too.
            let none = L::splat(-0.0);
            filled([none.fma(integers[0].add(zero), scale), none.fma(integers[1].add(zero), scale)])
        }
    }
}

/// Blocks of 4 bits with a minimum as stored.
#[derive(Clone, Copy)]
struct Q4Min<'a>(&'a Scales);

impl StoredRows for Q4Min<'_> {
    const DTYPE: StoredDType = StoredDType::Q4_1;
    const VECTORS: usize = 2;

    type Factors = ();

    #[inline(always)]
    unsafe fn factors<L: Lanes>(self, _row: *const u8, _at: usize) {}

    #[inline(always)]
    unsafe fn load<L: Lanes>(self, row: *const u8, at: usize, _: &()) -> [L; VECTORS_MAX] {
        // SAFETY: the caller's; `at` is the first value of a block.
        unsafe {
            let block = row.add(Self::DTYPE.bytes(at));
            let integers = L::load_five_bits(block.add(q4_1::HALVES_AT), 0);
            let (min, scale) = (L::splat(self.0.at(block.add(q4_1::MIN_AT))), L::splat(self.0.at(block)));
            filled([min.fma(integers[0], scale), min.fma(integers[1], scale)])
        }
    }
}

/// Blocks of 5 bits with a minimum as stored.
#[derive(Clone, Copy)]
struct Q5Min<'a>(&'a Scales);

impl StoredRows for Q5Min<'_> {
    const DTYPE: StoredDType = StoredDType::Q5_1;
    const VECTORS: usize = 2;

    type Factors = ();

    #[inline(always)]
    unsafe fn factors<L: Lanes>(self, _row: *const u8, _at: usize) {}

    #[inline(always)]
    unsafe fn load<L: Lanes>(self, row: *const u8, at: usize, _: &()) -> [L; VECTORS_MAX] {
        // SAFETY: the caller's; `at` is the first value of a block.
        unsafe {
            let block = row.add(Self::DTYPE.bytes(at));
            let integers = L::load_five_bits(block.add(q5_1::HALVES_AT), fifths(block.add(q5_1::FIFTHS_AT)));
            let (min, scale) = (L::splat(self.0.at(block.add(q5_1::MIN_AT))), L::splat(self.0.at(block)));
            filled([min.fma(integers[0], scale), min.fma(integers[1], scale)])
        }
    }
}

/// The fifth bits of a block.
#[inline(always)]
unsafe fn fifths(at: *const u8) -> u32 {
    // SAFETY: the caller's.
    u32::from_le_bytes(unsafe { at.cast::<[u8; 4]>().read() })
}

/// Blocks of 8 bits with a point of their own as stored.
#[derive(Clone, Copy)]
struct F8;

impl StoredRows for F8 {
    const DTYPE: StoredDType = StoredDType::F8;
    const VECTORS: usize = 4;

    type Factors = ();

    #[inline(always)]
    unsafe fn factors<L: Lanes>(self, _row: *const u8, _at: usize) {}

    #[inline(always)]
    unsafe fn load<L: Lanes>(self, row: *const u8, at: usize, _: &()) -> [L; VECTORS_MAX] {
        // SAFETY: the caller's; `at` is the first value of a block.
        unsafe {
            let block = row.add(Self::DTYPE.bytes(at));
            let scale = L::splat(f32::from_le_bytes(block.cast::<[u8; F8_SCALE_BYTES]>().read()));
            let (codes, none) = (block.add(F8_SCALE_BYTES), L::splat(-0.0));
            let value = |vector: usize| none.fma(L::load_e4m3(codes.add(vector * LANES)), scale);
            [value(0), value(1), value(2), value(3)]
        }
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

/// Super-blocks of 5 bits as stored.
#[derive(Clone, Copy)]
struct Q5K<'a>(&'a Scales);

impl StoredRows for Q5K<'_> {
    const DTYPE: StoredDType = StoredDType::Q5K;
    const VECTORS: usize = 4;
    const SHARING: usize = SUPER_BLOCK;
    type Factors = Factors;

    #[inline(always)]
    unsafe fn factors<L: Lanes>(self, row: *const u8, at: usize) -> Factors {
        // SAFETY: the caller's; `at` is the first value of a super-block. Scales lie as in Q4_K.
        unsafe { q4_k_factors::<L>(row.add(Self::DTYPE.bytes(at)), self.0) }
    }

    #[inline(always)]
    unsafe fn load<L: Lanes>(self, row: *const u8, at: usize, factors: &Factors) -> [L; VECTORS_MAX] {
        // SAFETY: the caller's; `at` is the first value of two parts.
        unsafe { q5_k_pair(row.add(Self::DTYPE.bytes(at)), at % SUPER_BLOCK / (2 * PART), factors) }
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

/// Writes the values of a row, which is whole blocks, in any format. Panics unless `widened` has as many.
///
/// # Safety
/// The machine must have what `L` needs.
#[inline(always)]
pub(super) unsafe fn widen_stored<L: Lanes>(dtype: StoredDType, scales: &Scales, bytes: &[u8], widened: &mut [f32]) {
    // SAFETY: the caller's machine; a row is whole vectors, or blocks, one after another.
    unsafe {
        match dtype {
            StoredDType::BF16 if widened.len().is_multiple_of(LANES) => widen_row::<L, _>(Bf16, bytes, widened),
            StoredDType::Q8_0 => widen_row::<L, _>(Q8(scales), bytes, widened),
            StoredDType::Q4_0 => widen_row::<L, _>(Q4(scales), bytes, widened),
            StoredDType::Q4_1 => widen_row::<L, _>(Q4Min(scales), bytes, widened),
            StoredDType::Q5_0 => widen_row::<L, _>(Q5(scales), bytes, widened),
            StoredDType::Q5_1 => widen_row::<L, _>(Q5Min(scales), bytes, widened),
            StoredDType::Q4K => widen_row::<L, _>(Q4K(scales), bytes, widened),
            StoredDType::Q5K => widen_row::<L, _>(Q5K(scales), bytes, widened),
            StoredDType::Q6K => widen_row::<L, _>(Q6K(scales), bytes, widened),
            StoredDType::F8 => widen_row::<L, _>(F8, bytes, widened),
            StoredDType::F32 | StoredDType::BF16 | StoredDType::F16 => dtype.widen_over(bytes, widened),
        }
    }
}

/// Writes the values of a row, which is whole vectors or blocks. Panics unless `widened` has as many.
///
/// # Safety
/// The machine must have what `L` needs.
#[inline(always)]
unsafe fn widen_row<L: Lanes, W: StoredRows>(rows: W, bytes: &[u8], widened: &mut [f32]) {
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
