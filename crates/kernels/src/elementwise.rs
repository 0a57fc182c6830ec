//! What is done value by value: sums, activations.

use crate::exp::exp;

/// silu(gate) * up of rows (n, 2 * width) that are a gate and what it gates, in place: (n, width)
pub fn gate_rows(rows: &mut Vec<f32>, width: usize) {
    let count = rows.len() / (2 * width);
    for row in 0..count {
        for at in 0..width {
            let (gate, up) = (rows[row * 2 * width + at], rows[row * 2 * width + width + at]);
            rows[row * width + at] = silu(gate) * up;
        }
    }
    rows.truncate(count * width);
}

/// x * sigmoid(x)
pub fn silu(x: f32) -> f32 {
    x * sigmoid(x)
}

/// 1 / (1 + e^-x), and e^x / (1 + e^x) where that is small, so that the power is never of a number above 0.
pub fn sigmoid(x: f32) -> f32 {
    let power = exp(-x.abs());
    if x < 0.0 { power / (1.0 + power) } else { 1.0 / (1.0 + power) }
}

/// Every row of `rows` += bias.
pub fn add_to_rows(rows: &mut [f32], bias: Option<&[f32]>) {
    if let Some(bias) = bias {
        rows.chunks_exact_mut(bias.len()).for_each(|row| add_to(row, bias));
    }
}

/// sum += x, of one length
pub fn add_to(sum: &mut [f32], x: &[f32]) {
    assert_eq!(sum.len(), x.len());
    sum.iter_mut().zip(x).for_each(|(sum, x)| *sum += x);
}

/// max(x, 0) in place, and NaN of NaN: a broken activation must not turn into an answer.
pub fn relu(x: &mut [f32]) {
    x.iter_mut().for_each(|x| *x = if *x < 0.0 { 0.0 } else { *x });
}
