//! What is done value by value.

use sida_kernels::elementwise::{add_to, relu};

/// Residuals or activations would be off.
#[test]
fn each_does_what_it_says() {
    let mut x = [1.0, -2.0, 3.0, f32::NAN];
    relu(&mut x);
    assert!(x[..3] == [1.0, 0.0, 3.0] && x[3].is_nan());
    add_to(&mut x[..3], &[1.0, 2.0, 3.0]);
    assert_eq!(x[..3], [2.0, 2.0, 6.0]);
}
