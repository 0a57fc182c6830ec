//! Blocks of values that share a scale (see [`crate::dtype`]), read as [`Lanes`](super::lanes::Lanes) of float32. Every value
//! is its integer times the scale, which float32 holds exactly: so it is the same value however it is made, and products
//! with blocks have the bits of products with those values.

use std::sync::LazyLock;

use half::f16;

use super::lanes::{LANES, Portable};
use crate::dtype::{Q4_ZERO, SCALE_BYTES};

/// Every scale as float32: to look one up takes no vector instruction, of which products have enough.
pub struct Scales(Box<[f32]>);

/// [`Scales`], made when the first block is multiplied.
pub(super) static SCALES: LazyLock<Scales> =
    LazyLock::new(|| Scales((0..=u16::MAX).map(|bits| f16::from_bits(bits).to_f32()).collect()));

impl Scales {
    /// The scale that lies at an address. A block begins with its own.
    #[inline(always)]
    pub(super) unsafe fn at(&self, bytes: *const u8) -> f32 {
        // SAFETY: the caller's address; there are as many entries as scales.
        unsafe { *self.0.get_unchecked(usize::from(u16::from_le_bytes(bytes.cast::<[u8; SCALE_BYTES]>().read()))) }
    }
}

/// The 32 values of a block as two vectors.
///
/// # Safety
/// As of [`Lanes`](super::lanes::Lanes); pointers are to whole blocks, of any alignment.
#[allow(clippy::missing_safety_doc)]
pub unsafe trait BlockLoads: Sized {
    /// Of a Q8_0 block.
    unsafe fn load_q8_0(block: *const u8, scales: &Scales) -> [Self; 2];
    /// Of a Q4_0 block.
    unsafe fn load_q4_0(block: *const u8, scales: &Scales) -> [Self; 2];
}

// SAFETY: needs no CPU features.
unsafe impl BlockLoads for Portable {
    #[inline(always)]
    unsafe fn load_q8_0(block: *const u8, scales: &Scales) -> [Self; 2] {
        // SAFETY: a block is a scale and 32 integers.
        let (scale, integers) = unsafe { (scales.at(block), block.add(SCALE_BYTES).cast::<[[i8; LANES]; 2]>().read()) };
        integers.map(|integers| Self(integers.map(|integer| scale * f32::from(integer))))
    }

    #[inline(always)]
    unsafe fn load_q4_0(block: *const u8, scales: &Scales) -> [Self; 2] {
        // SAFETY: a block is a scale and 16 bytes.
        let (scale, halves) = unsafe { (scales.at(block), block.add(SCALE_BYTES).cast::<[u8; LANES]>().read()) };
        let value = |half: u8| scale * f32::from(half as i8 - Q4_ZERO);
        [Self(halves.map(|byte| value(byte & 0xf))), Self(halves.map(|byte| value(byte >> 4)))]
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    //! SAFETY of this module: as of `lanes::x86`.
    #![allow(clippy::undocumented_unsafe_blocks)]

    use std::arch::x86_64::*;

    use super::{BlockLoads, LANES, SCALE_BYTES, Scales};
    use crate::lanes::{Avx2, Avx512};

    /// What the halves of a byte stand for in a Q4_0 block whose scale is 1.
    static Q4_VALUES: [f32; LANES] = [-8., -7., -6., -5., -4., -3., -2., -1., 0., 1., 2., 3., 4., 5., 6., 7.];

    unsafe impl BlockLoads for Avx512 {
        #[inline(always)]
        unsafe fn load_q8_0(block: *const u8, scales: &Scales) -> [Self; 2] {
            unsafe {
                let scale = _mm512_set1_ps(scales.at(block));
                let integers = _mm256_loadu_si256(block.add(SCALE_BYTES).cast());
                let value = |sixteen| Self(_mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(sixteen)), scale));
                [value(_mm256_castsi256_si128(integers)), value(_mm256_extracti128_si256::<1>(integers))]
            }
        }

        /// Looks halves up among the 16 values that they can stand for: fewer instructions than making each of them.
        #[inline(always)]
        unsafe fn load_q4_0(block: *const u8, scales: &Scales) -> [Self; 2] {
            unsafe {
                let values = _mm512_mul_ps(_mm512_loadu_ps(Q4_VALUES.as_ptr()), _mm512_set1_ps(scales.at(block)));
                let bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128(block.add(SCALE_BYTES).cast()));
                // Of an index only the low four bits count.
                let low = _mm512_permutexvar_ps(bytes, values);
                let high = _mm512_permutexvar_ps(_mm512_srli_epi32::<4>(bytes), values);
                [Self(low), Self(high)]
            }
        }
    }

    unsafe impl BlockLoads for Avx2 {
        #[inline(always)]
        unsafe fn load_q8_0(block: *const u8, scales: &Scales) -> [Self; 2] {
            unsafe {
                let scale = _mm256_set1_ps(scales.at(block));
                let value = |at: usize| {
                    let eight = _mm256_cvtepi8_epi32(_mm_loadl_epi64(block.add(SCALE_BYTES + at).cast()));
                    _mm256_mul_ps(_mm256_cvtepi32_ps(eight), scale)
                };
                [Self(value(0), value(8)), Self(value(16), value(24))]
            }
        }

        #[inline(always)]
        unsafe fn load_q4_0(block: *const u8, scales: &Scales) -> [Self; 2] {
            unsafe {
                let (scale, zero) = (_mm256_set1_ps(scales.at(block)), _mm256_set1_epi32(super::Q4_ZERO.into()));
                let eight = |at: usize| _mm256_cvtepu8_epi32(_mm_loadl_epi64(block.add(SCALE_BYTES + at).cast()));
                let (first, second) = (eight(0), eight(8));
                let value = |half| _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_sub_epi32(half, zero)), scale);
                let low = |bytes| value(_mm256_and_si256(bytes, _mm256_set1_epi32(0xf)));
                let high = |bytes| value(_mm256_srli_epi32::<4>(bytes));
                [Self(low(first), low(second)), Self(high(first), high(second))]
            }
        }
    }
}
