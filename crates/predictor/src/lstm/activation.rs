//! Sigmoid, tanh and an LSTM cell on [`exp`](sida_kernels::exp), which is the same on every machine.

use sida_kernels::{
    exp::exp,
    lanes::{Kernel, Lanes, run},
};

/// `1 / (1 + e^-x)`.
#[inline(always)]
pub(crate) fn sigmoid(x: f32) -> f32 {
    // Beyond 80 the result is 0 to 35 digits, and exp overflows soon after.
    1.0 / (1.0 + exp((-x).min(80.0)))
}

/// By sigmoid: absolute precision is what an LSTM needs of it.
#[inline(always)]
pub(crate) fn tanh(x: f32) -> f32 {
    2.0 * sigmoid(2.0 * x) - 1.0
}

/// One step of LSTM cells: `cell = f * cell + i * g`, `hidden = o * tanh(cell)`.
/// gates (4 width) holds the sums before activation of i, f, g, o and is left with what they became.
pub(crate) fn step(gates: &mut [f32], cell: &mut [f32], hidden: &mut [f32]) {
    struct Step<'a>(&'a mut [f32], &'a mut [f32], &'a mut [f32]);
    impl Kernel for Step<'_> {
        type Output = ();
        #[inline(always)]
        unsafe fn run<L: Lanes>(self) {
            let Self(gates, cell, hidden) = self;
            let width = cell.len();
            let (i, rest) = gates.split_at_mut(width);
            let (f, rest) = rest.split_at_mut(width);
            let (g, o) = rest.split_at_mut(width);
            let (o, hidden) = (&mut o[..width], &mut hidden[..width]);
            for at in 0..width {
                i[at] = sigmoid(i[at]);
                f[at] = sigmoid(f[at]);
                g[at] = tanh(g[at]);
                o[at] = sigmoid(o[at]);
                cell[at] = f[at] * cell[at] + i[at] * g[at];
                hidden[at] = o[at] * tanh(cell[at]);
            }
        }
    }
    assert_eq!((gates.len(), hidden.len()), (4 * cell.len(), cell.len()));
    run(Step(gates, cell, hidden));
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Predictions would drift from what was trained, or overflow.
    #[test]
    fn agrees_with_the_exact_functions() {
        for n in -3000..3000 {
            let x = n as f32 / 100.0;
            let exact = 1.0 / (1.0 + (-f64::from(x)).exp());
            assert!((f64::from(sigmoid(x)) - exact).abs() < 2e-7, "sigmoid({x}) is {}, not {exact}", sigmoid(x));
            assert!((f64::from(tanh(x)) - f64::from(x).tanh()).abs() < 4e-7, "tanh({x})");
        }
        assert_eq!((sigmoid(1e9), tanh(-1e9), tanh(1e9)), (1.0, -1.0, 1.0));
    }
}
