//! Norms and softmax.

use sida_kernels::norm::{rms_norm, softmax};

/// Every hidden state would have the wrong length.
#[test]
fn norm_follows_its_equation_row_by_row() {
    let x: Vec<f32> = (0..3 * 37).map(|i| (i as f32 * 0.37).sin() * 3.0).collect();
    let w: Vec<f32> = (0..37).map(|i| 0.5 + i as f32 / 37.0).collect();
    let mut y = vec![0.0; x.len()];
    rms_norm(&x, &w, 1e-6, &mut y);
    for (x, y) in x.chunks(37).zip(y.chunks(37)) {
        let mean = x.iter().map(|&v| f64::from(v).powi(2)).sum::<f64>() / 37.0;
        for ((&x, &y), &w) in x.iter().zip(y).zip(&w) {
            let exact = f64::from(w) * f64::from(x) / (mean + 1e-6).sqrt();
            assert!((f64::from(y) - exact).abs() < 1e-6, "{y} is not {exact}");
        }
        let mut alone = vec![0.0; 37];
        rms_norm(x, &w, 1e-6, &mut alone);
        assert_eq!(alone, y);
    }
}

/// Router probabilities would not be probabilities, or a huge logit would overflow.
#[test]
fn softmax_sums_to_one_and_keeps_order() {
    let mut x: Vec<f32> = (0..2 * 67).map(|i| if i == 5 { 1e30 } else { (i as f32 * 1.7).cos() * 5.0 }).collect();
    let before = x.clone();
    softmax(&mut x, 67);
    assert_eq!(x[5], 1.0);
    let sum: f64 = x[67..].iter().map(|&p| f64::from(p)).sum();
    assert!((sum - 1.0).abs() < 1e-6, "{sum}");
    let exact: f64 = before[67..].iter().map(|&v| f64::from(v).exp()).sum();
    for (&p, &v) in x[67..].iter().zip(&before[67..]) {
        assert!((f64::from(p) - f64::from(v).exp() / exact).abs() < 1e-7);
    }
    let mut bad = [1.0, f32::NAN, 2.0];
    softmax(&mut bad, 3);
    assert!(bad.iter().all(|p| p.is_nan()));
}
