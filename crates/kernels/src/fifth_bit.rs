//! Blocks of 32 values with a fifth bit or a value that 0 stands for: the formats that ggml calls Q5_0, Q4_1 and Q5_1
//! (`ggml-common.h`), byte for byte. Behind the scale, and the minimum where there is one, come the fifth bits, where there are
//! any, and then halves of bytes as in Q4_0.
//!
//! An integer times a scale has 16 bits at most, so float32 holds it exactly, and a minimum is added with one rounding:
//! values are, to the bit, what ggml makes of them.

use half::f16;

use crate::dtype::BLOCK;

/// Where things are in a Q5_0 block, behind its scale.
pub(crate) mod q5_0 {
    pub(crate) const FIFTHS_AT: usize = 2;
    pub(crate) const HALVES_AT: usize = 6;
    pub(crate) const BYTES: usize = 22;
    /// Added to the integers, so that they are none below 0.
    pub(crate) const ZERO: i8 = 16;
}

/// Where things are in a Q4_1 block, behind its scale.
pub(crate) mod q4_1 {
    pub(crate) const MIN_AT: usize = 2;
    pub(crate) const HALVES_AT: usize = 4;
    pub(crate) const BYTES: usize = 20;
}

/// Where things are in a Q5_1 block, behind its scale.
pub(crate) mod q5_1 {
    pub(crate) const MIN_AT: usize = 2;
    pub(crate) const FIFTHS_AT: usize = 4;
    pub(crate) const HALVES_AT: usize = 8;
    pub(crate) const BYTES: usize = 24;
}

/// The values of a Q5_0 block.
pub(crate) fn widen_q5_0(block: &[u8; q5_0::BYTES], out: &mut [f32; BLOCK]) {
    let (scale, fifths) = (scale_at(block, 0), fifths_at(block, q5_0::FIFTHS_AT));
    let integer = |i| integer(&block[q5_0::HALVES_AT..], fifths, i) - i32::from(q5_0::ZERO);
    out.iter_mut().enumerate().for_each(|(i, out)| *out = integer(i) as f32 * scale);
}

/// The values of a Q4_1 block.
pub(crate) fn widen_q4_1(block: &[u8; q4_1::BYTES], out: &mut [f32; BLOCK]) {
    let (scale, min) = (scale_at(block, 0), scale_at(block, q4_1::MIN_AT));
    let integer = |i| integer(&block[q4_1::HALVES_AT..], 0, i);
    out.iter_mut().enumerate().for_each(|(i, out)| *out = integer(i) as f32 * scale + min);
}

/// The values of a Q5_1 block.
pub(crate) fn widen_q5_1(block: &[u8; q5_1::BYTES], out: &mut [f32; BLOCK]) {
    let (scale, min) = (scale_at(block, 0), scale_at(block, q5_1::MIN_AT));
    let fifths = fifths_at(block, q5_1::FIFTHS_AT);
    let integer = |i| integer(&block[q5_1::HALVES_AT..], fifths, i);
    out.iter_mut().enumerate().for_each(|(i, out)| *out = integer(i) as f32 * scale + min);
}

/// Integer `i`: the low half of a byte, or from the 16th on the high one, and a fifth bit, the first lowest.
fn integer(halves: &[u8], fifths: u32, i: usize) -> i32 {
    let half = halves[i % (BLOCK / 2)] >> (i / (BLOCK / 2) * 4) & 0xf;
    i32::from(half) | ((fifths >> i & 1) as i32) << 4
}

fn fifths_at(block: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([block[at], block[at + 1], block[at + 2], block[at + 3]])
}

fn scale_at(block: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([block[at], block[at + 1]]).to_f32()
}

/// Writes integers of a Q5_0 block, -16 to 15, behind its scale.
pub fn put_q5_0(integers: [i8; BLOCK], rest: &mut [u8]) {
    let (fifths, halves) = rest.split_at_mut(q5_0::HALVES_AT - q5_0::FIFTHS_AT);
    let unsigned = integers.map(|integer| (integer + q5_0::ZERO) as u8);
    let bits = unsigned.iter().enumerate().fold(0, |bits, (i, &integer)| bits | u32::from(integer >> 4 & 1) << i);
    fifths.copy_from_slice(&bits.to_le_bytes());
    let (low, high) = unsigned.split_at(BLOCK / 2);
    let pairs = low.iter().zip(high).map(|(&low, &high)| low & 0xf | high << 4);
    halves.iter_mut().zip(pairs).for_each(|(to, byte)| *to = byte);
}
