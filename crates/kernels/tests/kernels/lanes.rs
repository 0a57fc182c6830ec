//! Vectors of every kind compute the same bits.

use sida_kernels::lanes::dot;

use crate::each_kind;

/// Rows would change bits when they move between machines with other vector units.
#[test]
fn all_lanes_agree_to_the_bit() {
    for len in [1, 5, 15, 16, 17, 31, 32, 128, 769] {
        let a: Vec<f32> = (0..len).map(|i| ((i * 37 % 101) as f32 - 50.0) / 7.0).collect();
        let b: Vec<f32> = (0..len).map(|i| ((i * 53 % 97) as f32 - 48.0) / 11.0).collect();
        let sums = each_kind(|| dot(&a, &b));
        assert!(sums.iter().all(|sum| sum.to_bits() == sums[0].to_bits()), "len {len}: {sums:?}");
    }
}
