//! The T5 norm on rows: no mean subtracted, no bias.

use super::lanes::{self, Kernel, LANES, Lanes, dot_lanes};

/// `y = w * x / sqrt(mean(x^2) + epsilon)` for each row of x (n, w.len()), into y.
/// Source: transformers, SwitchTransformersLayerNorm.
///
/// Panics when the lengths do not fit.
pub fn rms_norm(x: &[f32], w: &[f32], epsilon: f32, y: &mut [f32]) {
    assert_eq!(x.len(), y.len());
    assert!(!w.is_empty() && x.len().is_multiple_of(w.len()), "x is (n, {})", w.len());
    lanes::run(RmsNorm { x, w, epsilon, y });
}

struct RmsNorm<'a> {
    x: &'a [f32],
    w: &'a [f32],
    epsilon: f32,
    y: &'a mut [f32],
}

impl Kernel for RmsNorm<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<L: Lanes>(self) {
        let d = self.w.len();
        for (x, y) in self.x.chunks_exact(d).zip(self.y.chunks_exact_mut(d)) {
            // SAFETY: x is d floats.
            let square = unsafe { dot_lanes::<L>(x.as_ptr(), x.as_ptr(), d) };
            let scale = 1.0 / (square / d as f32 + self.epsilon).sqrt();
            for ((y, x), w) in y.iter_mut().zip(x).zip(self.w) {
                *y = w * (x * scale);
            }
        }
    }
}

/// Softmax of each row of x (n, width) in place: `e^(x - max x) / sum`. Exactly 1 in sum up to rounding; a row
/// with a NaN becomes NaN.
pub fn softmax(x: &mut [f32], width: usize) {
    lanes::run(Softmax { x, width });
}

struct Softmax<'a> {
    x: &'a mut [f32],
    width: usize,
}

impl Kernel for Softmax<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<L: Lanes>(self) {
        for row in self.x.chunks_mut(self.width.max(1)) {
            softmax_row(row);
        }
    }
}

/// [`softmax`] of one row, to be inlined into a kernel so that it is compiled for the machine's vectors.
/// Lane l takes every 16th value; the lanes are folded as those of a dot product.
#[inline(always)]
pub(super) fn softmax_row(row: &mut [f32]) {
    let mut maxima = [f32::NEG_INFINITY; LANES];
    let (whole, rest) = row.as_chunks::<LANES>();
    for chunk in whole {
        for (max, &x) in maxima.iter_mut().zip(chunk) {
            *max = larger(*max, x);
        }
    }
    for (max, &x) in maxima.iter_mut().zip(rest) {
        *max = larger(*max, x);
    }
    let largest = folded(maxima, larger);
    let mut sums = [0.0_f32; LANES];
    let (whole, rest) = row.as_chunks_mut::<LANES>();
    for chunk in whole {
        for (x, sum) in chunk.iter_mut().zip(&mut sums) {
            *x = super::exp::exp(*x - largest);
            *sum += *x;
        }
    }
    for (x, sum) in rest.iter_mut().zip(&mut sums) {
        *x = super::exp::exp(*x - largest);
        *sum += *x;
    }
    let scale = 1.0 / folded(sums, |a, b| a + b);
    let (whole, rest) = row.as_chunks_mut::<LANES>();
    for chunk in whole {
        chunk.iter_mut().for_each(|x| *x *= scale);
    }
    rest.iter_mut().for_each(|x| *x *= scale);
}

/// The larger of two; the first if the second is not a number.
#[inline(always)]
fn larger(a: f32, b: f32) -> f32 {
    if b > a { b } else { a }
}

/// All lanes in one: lane l with l + 8, then + 4, + 2, + 1.
#[inline(always)]
fn folded(lanes: [f32; LANES], fold: impl Fn(f32, f32) -> f32) -> f32 {
    let mut eight = [0.0; 8];
    let mut four = [0.0; 4];
    for l in 0..8 {
        eight[l] = fold(lanes[l], lanes[l + 8]);
    }
    for l in 0..4 {
        four[l] = fold(eight[l], eight[l + 4]);
    }
    fold(fold(four[0], four[2]), fold(four[1], four[3]))
}

#[cfg(test)]
mod tests {
    use super::*;

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
}
