//! Values of 8 bits with a point of their own: blocks of 64 neighbours of a row, a float32 scale and 64 numbers of the kind
//! e4m3 (a sign, 4 bits of exponent, 3 of mantissa; "FP8 Formats for Deep Learning", arXiv 2209.05433). A format of ours, for
//! checkpoints in FP8, whose scales belong to whole rows or to squares of a matrix: they are repeated.
//!
//! A value is its number times the scale, rounded once to float32, as other software has it. Two of the 256 codes are no
//! numbers in e4m3; `sida convert` refuses them by name, and here they are 480, as their bits would mean otherwise.

/// Values of a block: every published width is a multiple of it, and a scale takes half a bit of each.
pub(crate) const F8_BLOCK: usize = 64;
/// Bytes of a block's scale, which comes first.
pub(crate) const F8_SCALE_BYTES: usize = 4;
/// Bytes of a block.
pub(crate) const F8_BYTES: usize = F8_SCALE_BYTES + F8_BLOCK;

/// Whether a code is no number.
pub(crate) fn is_nan(code: u8) -> bool {
    code & 0x7f == 0x7f
}

/// Where the bits of a number belong in a float32: its sign 24 bits higher, the others 20.
pub(crate) const F8_BITS: u32 = 0x87f0_0000;
/// What they are multiplied by there: the exponent counts from 7 in a number, and from 127 in a float32. The smallest numbers,
/// which have no leading 1, have none there, either.
pub(crate) const F8_EXPONENTS: f32 = f32::from_bits((127 + 120) << 23);

/// The number of a code, exactly.
fn number(code: u8) -> f32 {
    f32::from_bits((i32::from(code as i8) << 20) as u32 & F8_BITS) * F8_EXPONENTS
}

/// The values of a block.
pub(crate) fn widen(block: &[u8; F8_BYTES], out: &mut [f32; F8_BLOCK]) {
    let (scale, codes) = block.split_first_chunk().expect("a block has a scale");
    let scale = f32::from_le_bytes(*scale);
    out.iter_mut().zip(codes).for_each(|(out, &code)| *out = number(code) * scale);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_those_of_the_format() {
        // Would break: weights of a model in FP8 would be others.
        for code in 0..=u8::MAX {
            let (exponent, mantissa) = (i32::from(code >> 3 & 0xf), f32::from(code & 7) / 8.0);
            let size = if exponent == 0 { mantissa / 64.0 } else { (1.0 + mantissa) * 2.0_f32.powi(exponent - 7) };
            let expected = if code & 0x80 == 0 { size } else { -size };
            assert_eq!(number(code).to_bits(), expected.to_bits(), "{code:#04x}");
            assert_eq!(is_nan(code), size == 480.0, "{code:#04x}");
        }
    }

    #[test]
    fn a_block_is_its_numbers_times_its_scale() {
        // Would break: values would have another's scale, or another's place.
        let scale = 0.000_123_f32;
        let mut block = [0; F8_BYTES];
        block[..4].copy_from_slice(&scale.to_le_bytes());
        (0..F8_BLOCK).for_each(|i| block[4 + i] = (i * 4) as u8);
        let mut out = [0.0; F8_BLOCK];
        widen(&block, &mut out);
        (0..F8_BLOCK).for_each(|i| assert_eq!(out[i], number((i * 4) as u8) * scale, "value {i}"));
    }
}
