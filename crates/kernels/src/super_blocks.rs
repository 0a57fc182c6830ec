//! Super-blocks of 256 values: the formats that ggml calls Q4_K, Q5_K and Q6_K (`ggml-common.h`), byte for byte. A super-block is
//! cut into parts that have small integers for scales; what these count in is the super-block's own scale, a binary16.
//!
//! A value of Q6_K is three factors of 11, 7 and 5 bits and a sign, which float32 holds exactly. One of Q4_K or Q5_K is the
//! difference of two such products, each of them exact: the difference is rounded once, to nearest, whether a machine multiplies and
//! subtracts in one step or in two. So all are, to the bit, what ggml makes of them.

use std::array;

use half::f16;

/// Values of a super-block.
pub const SUPER_BLOCK: usize = 256;
/// Values whose scales and bytes are found together.
pub(crate) const PART: usize = 32;

/// Where things are in a Q4_K super-block: the unit of scales, the unit of what is taken off, both of 8 parts in 6 bits each,
/// and halves of bytes: the low ones of 32 bytes are one part, the high ones the next.
pub(crate) mod q4_k {
    pub(crate) const MIN_AT: usize = 2;
    pub(crate) const SCALES_AT: usize = 4;
    pub(crate) const HALVES_AT: usize = 16;
    pub(crate) const BYTES: usize = 144;
}

/// Where things are in a Q5_K super-block: as in Q4_K, and before the halves of bytes the fifth bits. Byte `i` of these has
/// value `i` of each part, the first part's lowest.
pub(crate) mod q5_k {
    pub(crate) const FIFTHS_AT: usize = 16;
    pub(crate) const HALVES_AT: usize = 48;
    pub(crate) const BYTES: usize = 176;
}

/// Where things are in a Q6_K super-block: the low 4 bits of all values, their high 2 bits, a scale for each 16 values, and the
/// unit of scales. The second 128 values are stored behind the first ones; a byte of low bits has those of two values 64 apart,
/// one of high bits those of four values 32 apart.
pub(crate) mod q6_k {
    pub(crate) const HIGH_AT: usize = 128;
    pub(crate) const SCALES_AT: usize = 192;
    pub(crate) const UNIT_AT: usize = 208;
    pub(crate) const BYTES: usize = 210;
    /// Added to the integers, so that they are none below 0.
    pub(crate) const ZERO: i8 = 32;
}

/// Of a Q4_K super-block's 12 bytes of scales, those of its 8 parts, then how much is taken off. Those of the first four parts are
/// the low 6 bits of a byte each, those of the others 4 bits and the 2 bits above the others' 6.
#[inline(always)]
pub(crate) fn q4_k_scales(bytes: [u8; 12]) -> [u64; 2] {
    let [s0, s1, s2, s3, m0, m1, m2, m3, r0, r1, r2, r3] = bytes;
    let (scales, mins) = (u32::from_le_bytes([s0, s1, s2, s3]), u32::from_le_bytes([m0, m1, m2, m3]));
    let rest = u32::from_le_bytes([r0, r1, r2, r3]);
    let eight = |own: u32, rest: u32| {
        u64::from(own & 0x3f3f_3f3f) | u64::from(rest & 0x0f0f_0f0f | own >> 2 & 0x3030_3030) << 32
    };
    [eight(scales, rest), eight(mins, rest >> 4)]
}

/// Where a Q6_K super-block has the bits of parts `2 * pair` and the next one, from its beginning: the 64 bytes with the low
/// bits of both, the 32 bytes with their high bits, and how far these and those are shifted. The high bits of the second part
/// are 2 bits farther up.
#[inline(always)]
pub(crate) fn q6_k_bits(pair: usize) -> (usize, usize, u32) {
    (pair / 2 * 64, q6_k::HIGH_AT + pair / 2 * PART, (pair % 2 * 4) as u32)
}

/// The values of a Q4_K super-block.
pub(crate) fn widen_q4_k(block: &[u8; q4_k::BYTES], out: &mut [f32; SUPER_BLOCK]) {
    let (unit, min_unit) = (unit(block, 0), unit(block, q4_k::MIN_AT));
    let scales = array::from_fn(|i| block[q4_k::SCALES_AT + i]);
    let [scales, mins] = q4_k_scales(scales).map(u64::to_le_bytes);
    for (part, out) in out.chunks_exact_mut(PART).enumerate() {
        let (scale, min) = (unit * f32::from(scales[part]), min_unit * f32::from(mins[part]));
        let halves = &block[q4_k::HALVES_AT + part / 2 * PART..][..PART];
        let values = halves.iter().map(|&byte| scale * f32::from(byte >> (part % 2 * 4) & 0xf) - min);
        out.iter_mut().zip(values).for_each(|(out, value)| *out = value);
    }
}

/// The values of a Q5_K super-block.
pub(crate) fn widen_q5_k(block: &[u8; q5_k::BYTES], out: &mut [f32; SUPER_BLOCK]) {
    let (unit, min_unit) = (unit(block, 0), unit(block, q4_k::MIN_AT));
    let scales = array::from_fn(|i| block[q4_k::SCALES_AT + i]);
    let [scales, mins] = q4_k_scales(scales).map(u64::to_le_bytes);
    for (part, out) in out.chunks_exact_mut(PART).enumerate() {
        let (scale, min) = (unit * f32::from(scales[part]), min_unit * f32::from(mins[part]));
        for (i, out) in out.iter_mut().enumerate() {
            let half = block[q5_k::HALVES_AT + part / 2 * PART + i] >> (part % 2 * 4) & 0xf;
            let fifth = block[q5_k::FIFTHS_AT + i] >> part & 1;
            *out = scale * f32::from(half | fifth << 4) - min;
        }
    }
}

/// The values of a Q6_K super-block.
pub(crate) fn widen_q6_k(block: &[u8; q6_k::BYTES], out: &mut [f32; SUPER_BLOCK]) {
    let unit = unit(block, q6_k::UNIT_AT);
    for (pair, out) in out.chunks_exact_mut(2 * PART).enumerate() {
        let (low_at, high_at, shift) = q6_k_bits(pair);
        for (i, out) in out.iter_mut().enumerate() {
            let scale = unit * f32::from(block[q6_k::SCALES_AT + pair * 4 + i / 16] as i8);
            let (low, high) =
                (block[low_at + i] >> shift & 0xf, block[high_at + i % PART] >> shift >> (i / PART * 2) & 3);
            *out = scale * f32::from((low | high << 4) as i8 - q6_k::ZERO);
        }
    }
}

fn unit(block: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([block[at], block[at + 1]]).to_f32()
}
