//! What the net is made of, forwards and backwards, on plain slices and the kernels that inference uses:
//! training sees what serving will compute. (A tensor library's automatic gradient was tried and was five
//! times slower: a recurrence becomes thousands of operations too small for it.)
//!
//! A `*_backward` takes what went forward and the gradient of its result, and returns the gradient of its
//! input; gradients of weights are added to what is there.
//!
//! In reading order: [`product`], [`lstm_scan`], [`attention`], [`loss`].

mod attention;
mod loss;
mod lstm_scan;
mod product;

pub(super) use self::{
    attention::Attention,
    loss::distillation,
    lstm_scan::{LstmScan, Scanned},
    product::{linear, linear_backward, relu_backward},
};

/// (rows, cols) -> (cols, rows), tile by tile: a column at a time would miss the cache at every value.
pub(super) fn transpose(values: &[f32], rows: usize, cols: usize) -> Vec<f32> {
    const TILE: usize = 16;
    let mut out = vec![0.0; values.len()];
    for first_row in (0..rows).step_by(TILE) {
        for first_col in (0..cols).step_by(TILE) {
            for row in first_row..rows.min(first_row + TILE) {
                for col in first_col..cols.min(first_col + TILE) {
                    out[col * rows + row] = values[row * cols + col];
                }
            }
        }
    }
    out
}

/// For the tests of gradients.
#[cfg(test)]
mod finite_differences {
    /// Values in [-1, 1].
    pub(super) fn values(count: usize, seed: usize) -> Vec<f32> {
        (0..count).map(|i| ((i * 37 + seed * 101) % 97) as f32 / 48.0 - 1.0).collect()
    }

    /// Compares a gradient with the change of `loss` in a few places.
    pub(super) fn check(at: &[f32], gradient: &[f32], loss: impl Fn(&[f32]) -> f32) {
        assert_eq!(at.len(), gradient.len());
        for place in (0..at.len()).step_by((at.len() / 9).max(1)) {
            let shifted = |by: f32| {
                let mut values = at.to_vec();
                values[place] += by;
                loss(&values)
            };
            let (found, expected) = (gradient[place], (shifted(1e-2) - shifted(-1e-2)) / 2e-2);
            assert!((found - expected).abs() < 5e-3 * expected.abs().max(1.0), "at {place}: {found}, not {expected}");
        }
    }

    /// Half the squared distance to fixed targets, and its gradient.
    pub(super) fn distance(values: &[f32]) -> (f32, Vec<f32>) {
        let targets = self::values(values.len(), 99);
        let gradient: Vec<f32> = values.iter().zip(targets).map(|(value, target)| value - target).collect();
        (gradient.iter().map(|g| 0.5 * g * g).sum(), gradient)
    }
}
