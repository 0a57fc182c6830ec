//! Numbers of FP8.

use sida_kernels::float8::{F8_BLOCK, F8_BYTES, is_nan, number, widen};

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
