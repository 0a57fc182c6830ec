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
