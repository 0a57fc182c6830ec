//! Parts of super-blocks (see [`crate::super_blocks`]), read as [`Lanes`](super::lanes::Lanes) of float32. Each step is exact but
//! for a difference, which is rounded once: so it is the same value however it is made.

use super::{
    block_loads::Scales,
    lanes::{LANES, Lanes, Portable},
};
use crate::super_blocks::{PART, q4_k, q4_k_scales, q5_k, q6_k, q6_k_bits};

/// What the integers of a super-block are multiplied by. Of Q4_K and Q5_K: the scales of 8 parts, then how much is taken off in each. Of
/// Q6_K: a quarter of the scale of each 16 values.
#[derive(Clone, Copy)]
#[repr(align(64))]
pub struct Factors([f32; 16]);

/// Values of super-blocks as vectors, of two parts that follow each other.
///
/// # Safety
/// As of [`Lanes`](super::lanes::Lanes); pointers are to what is read, of any alignment.
#[allow(clippy::missing_safety_doc)]
pub unsafe trait SuperBlockLoads: Sized {
    /// Integers times units, of which the first 8 have one and the others another.
    unsafe fn factors(integers: [i8; 16], units: [f32; 2]) -> Factors;
    /// Of two Q4_K parts, which share 32 bytes: each with a scale, and how much is taken off.
    unsafe fn load_q4_k(halves: *const u8, scales: [f32; 2], mins: [f32; 2]) -> [Self; 4];
    /// Of two Q6_K parts, from 64 bytes with their low bits and 32 with their high bits, in the high halves of those bytes if
    /// `is_high`; and for each 16 values a quarter of their scale.
    unsafe fn load_q6_k(low: *const u8, high: *const u8, is_high: bool, quarters: [f32; 4]) -> [Self; 4];
}

/// The factors of a Q4_K super-block.
///
/// # Safety
/// As of [`SuperBlockLoads`].
#[inline(always)]
pub(super) unsafe fn q4_k_factors<L: SuperBlockLoads>(block: *const u8, scales: &Scales) -> Factors {
    // SAFETY: the caller's block.
    unsafe {
        let [own, mins] = q4_k_scales(block.add(q4_k::SCALES_AT).cast::<[u8; 12]>().read());
        // They have 6 bits, so a sign is none of them.
        let integers = std::mem::transmute::<[u64; 2], [i8; 16]>([own.to_le(), mins.to_le()]);
        L::factors(integers, [scales.at(block), scales.at(block.add(q4_k::MIN_AT))])
    }
}

/// The values of parts `2 * pair` and the next one of a Q4_K super-block, of whose pairs there are 4.
///
/// # Safety
/// As of [`SuperBlockLoads`].
#[inline(always)]
pub(super) unsafe fn q4_k_pair<L: SuperBlockLoads>(block: *const u8, pair: usize, factors: &Factors) -> [L; 4] {
    let at = pair % 4 * 2;
    let [scales, mins] = [[factors.0[at], factors.0[at + 1]], [factors.0[at + 8], factors.0[at + 9]]];
    // SAFETY: the caller's block.
    unsafe { L::load_q4_k(block.add(q4_k::HALVES_AT + pair * PART), scales, mins) }
}

/// The values of parts `2 * pair` and the next one of a Q5_K super-block, of whose pairs there are 4.
///
/// # Safety
/// As of [`SuperBlockLoads`].
#[inline(always)]
pub(super) unsafe fn q5_k_pair<L: Lanes>(block: *const u8, pair: usize, factors: &Factors) -> [L; 4] {
    let part = pair % 4 * 2;
    // SAFETY: the caller's block.
    unsafe {
        let [a, c] = q5_k_integers::<L>(block, part, 0);
        let [b, d] = q5_k_integers::<L>(block, part, LANES);
        let (scale, min) = (L::splat(factors.0[part]), L::splat(-factors.0[part + 8]));
        let (next_scale, next_min) = (L::splat(factors.0[part + 1]), L::splat(-factors.0[part + 9]));
        [min.fma(a, scale), min.fma(b, scale), next_min.fma(c, next_scale), next_min.fma(d, next_scale)]
    }
}

/// The integers of 16 values from the `first` of a part on, and of the same of the next one.
#[inline(always)]
unsafe fn q5_k_integers<L: Lanes>(block: *const u8, part: usize, first: usize) -> [L; 2] {
    // SAFETY: the caller's block.
    unsafe {
        let [low, high] = block.add(q5_k::FIFTHS_AT + first).cast::<[u64; 2]>().read_unaligned();
        let (low, high) = (u64::from_le(low) >> part, u64::from_le(high) >> part);
        let fifths = bits(low) | bits(high) << 8 | bits(low >> 1) << 16 | bits(high >> 1) << 24;
        L::load_five_bits(block.add(q5_k::HALVES_AT + part / 2 * PART + first), fifths)
    }
}

/// The lowest bits of 8 bytes, the first lowest.
#[inline(always)]
fn bits(bytes: u64) -> u32 {
    // Each is moved to its place in the highest byte, and none to another's.
    ((bytes & 0x0101_0101_0101_0101).wrapping_mul(0x0102_0408_1020_4080) >> 56) as u32
}

/// The factors of a Q6_K super-block.
///
/// # Safety
/// As of [`SuperBlockLoads`].
#[inline(always)]
pub(super) unsafe fn q6_k_factors<L: SuperBlockLoads>(block: *const u8, scales: &Scales) -> Factors {
    // SAFETY: the caller's block.
    unsafe {
        let quarter = scales.at(block.add(q6_k::UNIT_AT)) * 0.25;
        L::factors(block.add(q6_k::SCALES_AT).cast::<[i8; 16]>().read(), [quarter; 2])
    }
}

/// The values of parts `2 * pair` and the next one of a Q6_K super-block, of whose pairs there are 4.
///
/// # Safety
/// As of [`SuperBlockLoads`].
#[inline(always)]
pub(super) unsafe fn q6_k_pair<L: SuperBlockLoads>(block: *const u8, pair: usize, factors: &Factors) -> [L; 4] {
    let at = pair % 4 * 4;
    let quarters = [factors.0[at], factors.0[at + 1], factors.0[at + 2], factors.0[at + 3]];
    let (low_at, high_at, shift) = q6_k_bits(pair);
    // SAFETY: the caller's block.
    unsafe { L::load_q6_k(block.add(low_at), block.add(high_at), shift > 0, quarters) }
}

#[inline(always)]
fn product(integers: [i8; 16], units: [f32; 2]) -> Factors {
    let mut factors = [0.0; 16];
    let mut i = 0;
    while i < factors.len() {
        factors[i] = units[i / 8] * f32::from(integers[i]);
        i += 1;
    }
    Factors(factors)
}

// SAFETY: needs no CPU features.
unsafe impl SuperBlockLoads for Portable {
    #[inline(always)]
    unsafe fn factors(integers: [i8; 16], units: [f32; 2]) -> Factors {
        product(integers, units)
    }

    #[inline(always)]
    unsafe fn load_q4_k(halves: *const u8, scales: [f32; 2], mins: [f32; 2]) -> [Self; 4] {
        // SAFETY: two parts share 32 bytes.
        let [first, second] = unsafe { halves.cast::<[[u8; LANES]; 2]>().read() };
        let values = |bytes: [u8; LANES], high: usize| {
            Self(bytes.map(|byte| scales[high] * f32::from(byte >> (4 * high) & 0xf) - mins[high]))
        };
        [values(first, 0), values(second, 0), values(first, 1), values(second, 1)]
    }

    #[inline(always)]
    unsafe fn load_q6_k(low: *const u8, high: *const u8, is_high: bool, quarters: [f32; 4]) -> [Self; 4] {
        // SAFETY: two parts have 64 bytes of these and 32 of those.
        let (low, high) = unsafe { (low.cast::<[u8; 2 * PART]>().read(), high.cast::<[u8; PART]>().read()) };
        let shift = if is_high { 4 } else { 0 };
        let integer = |i: usize| low[i] >> shift & 0xf | (high[i % PART] >> shift >> (i / PART * 2) & 3) << 4;
        std::array::from_fn(|vector| {
            let value = |i| quarters[vector] * 4.0 * f32::from(integer(i) as i8 - q6_k::ZERO);
            Self(std::array::from_fn(|lane| value(vector * LANES + lane)))
        })
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    //! Integers of 6 bits are put into the upper bits of bytes: with their highest bit turned over these are, as numbers with a
    //! sign, four times what the integers stand for.
    //!
    //! SAFETY of this module: as of `lanes::x86`.
    #![allow(clippy::undocumented_unsafe_blocks)]

    use std::arch::x86_64::*;

    use super::{Factors, LANES, PART, SuperBlockLoads, product};
    use crate::lanes::{Avx2, Avx512};

    /// What 4 bits stand for.
    static HALVES: [f32; LANES] = [0., 1., 2., 3., 4., 5., 6., 7., 8., 9., 10., 11., 12., 13., 14., 15.];
    /// How far to the left low bits are turned, where they are in the low halves of bytes and in the high ones.
    static LOW_TURNS: [i32; 2] = [2, 30];
    /// The same of high bits, for 32 bytes of a first part and 32 of a second.
    static HIGH_TURNS: [[i64; 8]; 2] = [[6, 6, 6, 6, 4, 4, 4, 4], [2, 2, 2, 2, 0, 0, 0, 0]];
    /// Where the low 4 bits then are in a byte, and all 6.
    const LOW_BITS: i32 = 0x3c3c_3c3c;
    const ALL_BITS: i32 = 0xfcfc_fcfc_u32 as i32;
    const HIGHEST_BIT: i32 = 0x8080_8080_u32 as i32;
    /// Of three bits: the second if the first is set, else the third; and the exclusive or of the third with both others.
    const CHOOSE: i32 = 0xca;
    const AND_XOR: i32 = 0x6a;

    /// What each of 4 bits stands for in a Q4_K part.
    #[inline(always)]
    unsafe fn q4_k_values(scale: f32, min: f32) -> __m512 {
        unsafe { _mm512_fmsub_ps(_mm512_loadu_ps(HALVES.as_ptr()), _mm512_set1_ps(scale), _mm512_set1_ps(min)) }
    }

    #[inline(always)]
    unsafe fn q6_k_values512(sixteen: __m128i, quarter: f32) -> Avx512 {
        unsafe { Avx512(_mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(sixteen)), _mm512_set1_ps(quarter))) }
    }

    unsafe impl SuperBlockLoads for Avx512 {
        #[inline(always)]
        unsafe fn factors(integers: [i8; 16], units: [f32; 2]) -> Factors {
            unsafe {
                let integers = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(integers.as_ptr().cast())));
                let units = _mm512_mask_mov_ps(_mm512_set1_ps(units[0]), 0xff00, _mm512_set1_ps(units[1]));
                let mut factors = Factors([0.0; 16]);
                _mm512_store_ps(factors.0.as_mut_ptr(), _mm512_mul_ps(integers, units));
                factors
            }
        }

        /// Looks halves up among the 16 values that they can stand for in their part.
        #[inline(always)]
        unsafe fn load_q4_k(halves: *const u8, scales: [f32; 2], mins: [f32; 2]) -> [Self; 4] {
            unsafe {
                let (low, high) = (q4_k_values(scales[0], mins[0]), q4_k_values(scales[1], mins[1]));
                let first = _mm512_cvtepu8_epi32(_mm_loadu_si128(halves.cast()));
                let second = _mm512_cvtepu8_epi32(_mm_loadu_si128(halves.add(LANES).cast()));
                // Of an index only the low four bits count.
                [
                    Self(_mm512_permutexvar_ps(first, low)),
                    Self(_mm512_permutexvar_ps(second, low)),
                    Self(_mm512_permutexvar_ps(_mm512_srli_epi32::<4>(first), high)),
                    Self(_mm512_permutexvar_ps(_mm512_srli_epi32::<4>(second), high)),
                ]
            }
        }

        #[inline(always)]
        unsafe fn load_q6_k(low: *const u8, high: *const u8, is_high: bool, quarters: [f32; 4]) -> [Self; 4] {
            unsafe {
                let turns = usize::from(is_high);
                let low = _mm512_rolv_epi32(_mm512_loadu_si512(low.cast()), _mm512_set1_epi32(LOW_TURNS[turns]));
                let high = _mm512_broadcast_i64x4(_mm256_loadu_si256(high.cast()));
                let high = _mm512_rolv_epi64(high, _mm512_loadu_si512(HIGH_TURNS[turns].as_ptr().cast()));
                let bits = _mm512_ternarylogic_epi32::<CHOOSE>(_mm512_set1_epi32(LOW_BITS), low, high);
                let (all, highest) = (_mm512_set1_epi32(ALL_BITS), _mm512_set1_epi32(HIGHEST_BIT));
                let bytes = _mm512_ternarylogic_epi32::<AND_XOR>(bits, all, highest);
                [
                    q6_k_values512(_mm512_castsi512_si128(bytes), quarters[0]),
                    q6_k_values512(_mm512_extracti32x4_epi32::<1>(bytes), quarters[1]),
                    q6_k_values512(_mm512_extracti32x4_epi32::<2>(bytes), quarters[2]),
                    q6_k_values512(_mm512_extracti32x4_epi32::<3>(bytes), quarters[3]),
                ]
            }
        }
    }

    /// The low halves of 8 bytes as values of a Q4_K part.
    #[inline(always)]
    unsafe fn q4_k_low(halves: *const u8, scale: __m256, min: __m256) -> __m256 {
        unsafe {
            let integers =
                _mm256_and_si256(_mm256_cvtepu8_epi32(_mm_loadl_epi64(halves.cast())), _mm256_set1_epi32(0xf));
            _mm256_fmsub_ps(_mm256_cvtepi32_ps(integers), scale, min)
        }
    }

    /// Their high halves.
    #[inline(always)]
    unsafe fn q4_k_high(halves: *const u8, scale: __m256, min: __m256) -> __m256 {
        unsafe {
            let integers = _mm256_srli_epi32::<4>(_mm256_cvtepu8_epi32(_mm_loadl_epi64(halves.cast())));
            _mm256_fmsub_ps(_mm256_cvtepi32_ps(integers), scale, min)
        }
    }

    /// The 32 values of a Q6_K part, whose bits are where they belong, among others.
    #[inline(always)]
    unsafe fn q6_k_values256(low: __m256i, high: __m256i, quarters: [f32; 2]) -> [Avx2; 2] {
        unsafe {
            let low = _mm256_and_si256(low, _mm256_set1_epi32(LOW_BITS));
            let high = _mm256_and_si256(high, _mm256_set1_epi32(ALL_BITS & !LOW_BITS));
            let bytes = _mm256_xor_si256(_mm256_or_si256(low, high), _mm256_set1_epi32(HIGHEST_BIT));
            let (first, second) = (_mm256_castsi256_si128(bytes), _mm256_extracti128_si256::<1>(bytes));
            [q6_k_sixteen(first, quarters[0]), q6_k_sixteen(second, quarters[1])]
        }
    }

    #[inline(always)]
    unsafe fn q6_k_sixteen(sixteen: __m128i, quarter: f32) -> Avx2 {
        unsafe {
            let quarter = _mm256_set1_ps(quarter);
            let first = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(sixteen));
            let second = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_unpackhi_epi64(sixteen, sixteen)));
            Avx2(_mm256_mul_ps(first, quarter), _mm256_mul_ps(second, quarter))
        }
    }

    unsafe impl SuperBlockLoads for Avx2 {
        #[inline(always)]
        unsafe fn factors(integers: [i8; 16], units: [f32; 2]) -> Factors {
            product(integers, units)
        }

        #[inline(always)]
        unsafe fn load_q4_k(halves: *const u8, scales: [f32; 2], mins: [f32; 2]) -> [Self; 4] {
            unsafe {
                let (scale, min) = (_mm256_set1_ps(scales[0]), _mm256_set1_ps(mins[0]));
                let low = [
                    Self(q4_k_low(halves, scale, min), q4_k_low(halves.add(8), scale, min)),
                    Self(q4_k_low(halves.add(16), scale, min), q4_k_low(halves.add(24), scale, min)),
                ];
                let (scale, min) = (_mm256_set1_ps(scales[1]), _mm256_set1_ps(mins[1]));
                let high = [
                    Self(q4_k_high(halves, scale, min), q4_k_high(halves.add(8), scale, min)),
                    Self(q4_k_high(halves.add(16), scale, min), q4_k_high(halves.add(24), scale, min)),
                ];
                [low[0], low[1], high[0], high[1]]
            }
        }

        #[inline(always)]
        unsafe fn load_q6_k(low: *const u8, high: *const u8, is_high: bool, quarters: [f32; 4]) -> [Self; 4] {
            unsafe {
                let (low, next) = (_mm256_loadu_si256(low.cast()), _mm256_loadu_si256(low.add(PART).cast()));
                let high = _mm256_loadu_si256(high.cast());
                let [first, second] = [[quarters[0], quarters[1]], [quarters[2], quarters[3]]];
                let ([a, b], [c, d]) = if is_high {
                    let low = [_mm256_srli_epi32::<2>(low), _mm256_srli_epi32::<2>(next)];
                    let of_first = q6_k_values256(low[0], _mm256_slli_epi32::<2>(high), first);
                    (of_first, q6_k_values256(low[1], high, second))
                } else {
                    let low = [_mm256_slli_epi32::<2>(low), _mm256_slli_epi32::<2>(next)];
                    let of_first = q6_k_values256(low[0], _mm256_slli_epi32::<6>(high), first);
                    (of_first, q6_k_values256(low[1], _mm256_slli_epi32::<4>(high), second))
                };
                [a, b, c, d]
            }
        }
    }
}
