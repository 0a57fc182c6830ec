//! Integers of halves of bytes with a fifth bit (see [`crate::fifth_bit`]), and numbers of 8 bits (see [`crate::float8`]), read as
//! [`Lanes`](super::lanes::Lanes) of float32, exactly.

use super::lanes::{LANES, Portable};
use crate::float8::{F8_BITS, F8_EXPONENTS};

/// What blocks are made of, as vectors.
///
/// # Safety
/// As of [`Lanes`](super::lanes::Lanes); pointers are to what is read, of any alignment.
#[allow(clippy::missing_safety_doc)]
pub unsafe trait IntegerLoads: Sized {
    /// 32 integers of 5 bits: the low halves of 16 bytes, then the high ones, and a fifth bit of each, the first lowest.
    unsafe fn load_five_bits(halves: *const u8, fifths: u32) -> [Self; 2];
    /// 16 numbers of 8 bits, e4m3.
    unsafe fn load_e4m3(codes: *const u8) -> Self;
}

// SAFETY: needs no CPU features.
unsafe impl IntegerLoads for Portable {
    #[inline(always)]
    unsafe fn load_five_bits(halves: *const u8, fifths: u32) -> [Self; 2] {
        // SAFETY: the caller's.
        let halves = unsafe { halves.cast::<[u8; LANES]>().read() };
        let integer = |half: u8, i: usize| f32::from(half | ((fifths >> i & 1) as u8) << 4);
        [
            Self(std::array::from_fn(|i| integer(halves[i] & 0xf, i))),
            Self(std::array::from_fn(|i| integer(halves[i] >> 4, i + LANES))),
        ]
    }

    #[inline(always)]
    unsafe fn load_e4m3(codes: *const u8) -> Self {
        // SAFETY: the caller's.
        let codes = unsafe { codes.cast::<[i8; LANES]>().read() };
        Self(codes.map(|code| f32::from_bits((i32::from(code) << 20) as u32 & F8_BITS) * F8_EXPONENTS))
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    //! SAFETY of this module: as of `lanes::x86`.
    #![allow(clippy::undocumented_unsafe_blocks)]

    use std::arch::x86_64::*;

    use super::{F8_BITS, F8_EXPONENTS, IntegerLoads};
    use crate::lanes::{Avx2, Avx512};

    /// Of four bytes the one with each of 32 bits, and all but that bit.
    static BYTES: [i64; 4] = [0, 0x0101_0101_0101_0101, 0x0202_0202_0202_0202, 0x0303_0303_0303_0303];
    const ALL_BUT_ONE: i64 = 0x7fbf_dfef_f7fb_fdfe;

    /// 32 integers of 5 bits as bytes.
    #[inline(always)]
    unsafe fn five_bits(halves: *const u8, fifths: u32) -> [__m128i; 2] {
        unsafe {
            let halves = _mm_loadu_si128(halves.cast());
            let integers = _mm256_set_m128i(_mm_srli_epi16::<4>(halves), halves);
            let integers = _mm256_and_si256(integers, _mm256_set1_epi8(0xf));
            let bytes =
                _mm256_shuffle_epi8(_mm256_set1_epi32(fifths as i32), _mm256_loadu_si256(BYTES.as_ptr().cast()));
            let others = _mm256_or_si256(bytes, _mm256_set1_epi64x(ALL_BUT_ONE));
            let fifths = _mm256_and_si256(_mm256_cmpeq_epi8(others, _mm256_set1_epi8(-1)), _mm256_set1_epi8(16));
            let integers = _mm256_or_si256(integers, fifths);
            [_mm256_castsi256_si128(integers), _mm256_extracti128_si256::<1>(integers)]
        }
    }

    unsafe impl IntegerLoads for Avx512 {
        #[inline(always)]
        unsafe fn load_five_bits(halves: *const u8, fifths: u32) -> [Self; 2] {
            unsafe {
                let [low, high] = five_bits(halves, fifths);
                let floats = |bytes| Self(_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(bytes)));
                [floats(low), floats(high)]
            }
        }

        #[inline(always)]
        unsafe fn load_e4m3(codes: *const u8) -> Self {
            unsafe {
                let bits = _mm512_slli_epi32::<20>(_mm512_cvtepi8_epi32(_mm_loadu_si128(codes.cast())));
                let bits = _mm512_and_si512(bits, _mm512_set1_epi32(F8_BITS as i32));
                Self(_mm512_mul_ps(_mm512_castsi512_ps(bits), _mm512_set1_ps(F8_EXPONENTS)))
            }
        }
    }

    unsafe impl IntegerLoads for Avx2 {
        #[inline(always)]
        unsafe fn load_five_bits(halves: *const u8, fifths: u32) -> [Self; 2] {
            unsafe {
                let [low, high] = five_bits(halves, fifths);
                let floats = |bytes| _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(bytes));
                let sixteen = |bytes| Self(floats(bytes), floats(_mm_unpackhi_epi64(bytes, bytes)));
                [sixteen(low), sixteen(high)]
            }
        }

        #[inline(always)]
        unsafe fn load_e4m3(codes: *const u8) -> Self {
            unsafe {
                let eight = |codes: *const u8| {
                    let bits = _mm256_slli_epi32::<20>(_mm256_cvtepi8_epi32(_mm_loadl_epi64(codes.cast())));
                    let bits = _mm256_and_si256(bits, _mm256_set1_epi32(F8_BITS as i32));
                    _mm256_mul_ps(_mm256_castsi256_ps(bits), _mm256_set1_ps(F8_EXPONENTS))
                };
                Self(eight(codes), eight(codes.add(8)))
            }
        }
    }
}
