//! Values of 8 bits with a point of their own: blocks of 64 neighbours of a row, a float32 scale and 64 numbers of the kind
//! e4m3 (a sign, 4 bits of exponent, 3 of mantissa; "FP8 Formats for Deep Learning", arXiv 2209.05433). A format of ours, for
//! checkpoints in FP8, whose scales belong to whole rows or to squares of a matrix: they are repeated.
//!
//! A value is its number times the scale, rounded once to float32, as other software has it. Two of the 256 codes are no
//! numbers in e4m3; `sida convert` refuses them by name, and here they are 480, as their bits would mean otherwise.

/// Values of a block: every published width is a multiple of it, and a scale takes half a bit of each.
pub const F8_BLOCK: usize = 64;
/// Bytes of a block's scale, which comes first.
pub const F8_SCALE_BYTES: usize = 4;
/// Bytes of a block.
pub const F8_BYTES: usize = F8_SCALE_BYTES + F8_BLOCK;

/// Whether a code is no number.
pub fn is_nan(code: u8) -> bool {
    code & 0x7f == 0x7f
}

/// Where the bits of a number belong in a float32: its sign 24 bits higher, the others 20.
pub const F8_BITS: u32 = 0x87f0_0000;
/// What they are multiplied by there: the exponent counts from 7 in a number, and from 127 in a float32. The smallest numbers,
/// which have no leading 1, have none there, either.
pub const F8_EXPONENTS: f32 = f32::from_bits((127 + 120) << 23);

/// The number of a code, exactly.
pub fn number(code: u8) -> f32 {
    f32::from_bits((i32::from(code as i8) << 20) as u32 & F8_BITS) * F8_EXPONENTS
}

/// The values of a block.
pub fn widen(block: &[u8; F8_BYTES], out: &mut [f32; F8_BLOCK]) {
    let (scale, codes) = block.split_first_chunk().expect("a block has a scale");
    let scale = f32::from_le_bytes(*scale);
    out.iter_mut().zip(codes).for_each(|(out, &code)| *out = number(code) * scale);
}
