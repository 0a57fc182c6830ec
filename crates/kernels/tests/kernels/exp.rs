//! Powers of e.

use sida_kernels::exp::exp;

/// Attention and router probabilities would be off.
#[test]
fn agrees_with_the_exact_value() {
    let mut worst = 0.0_f64;
    for step in 0..=2_000_000 {
        let x = -87.3 + step as f32 * 1e-4 * 0.4365;
        let exact = f64::from(x).exp();
        worst = worst.max((f64::from(exp(x)) - exact).abs() / exact);
    }
    assert!(worst < 2.0 * f64::from(f32::EPSILON), "relative error {worst:e}");
    assert_eq!(exp(0.0), 1.0);
    assert_eq!(exp(-1e30), 0.0);
    assert_eq!(exp(f32::NEG_INFINITY), 0.0);
    assert!(exp(f32::NAN).is_nan());
}
