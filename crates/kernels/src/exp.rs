//! e^x in plain IEEE operations. The C library's `expf` gives other bits on other machines and is called a
//! value at a time; this one is the same everywhere, and loops over it become vector code.

/// e^x to within 2 units in the last place; 0 below -87.33, where the result would be subnormal, and
/// NaN of NaN. Not for x above 88: softmax never goes above 0.
///
/// Cody-Waite: x = n ln 2 + r with |r| <= ln 2 / 2, a polynomial for e^r, and n added to the exponent.
#[inline(always)]
pub fn exp(x: f32) -> f32 {
    /// Adding 1.5 * 2^23 rounds to an integer and leaves it in the low bits.
    const ROUND: f32 = 12_582_912.0;
    /// ln 2 in two parts; the first has few bits, so n times it is exact.
    const LN_2_HIGH: f32 = 0.693_359_4; // 0x3F318000
    const LN_2_LOW: f32 = -2.121_944_4e-4;
    let shifted = x.mul_add(std::f32::consts::LOG2_E, ROUND);
    let n = shifted - ROUND;
    let r = n.mul_add(-LN_2_LOW, n.mul_add(-LN_2_HIGH, x));
    let mut p = 1.987_569_1e-4_f32;
    for coefficient in [1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 5e-1] {
        p = p.mul_add(r, coefficient);
    }
    let e_r = p.mul_add(r * r, r + 1.0);
    let scaled = f32::from_bits(e_r.to_bits().wrapping_add(shifted.to_bits() << 23));
    if x < -87.33 { 0.0 } else { scaled }
}
