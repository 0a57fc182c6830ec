//! For the tests of gradients: automatic ones are right where the operations are, and ours include a support that is
//! held constant and tensors that are cut and joined.

use candle_core::{Device, Tensor, Var};

/// A variable of values in [-1, 1].
pub(super) fn values(shape: &[usize], seed: usize) -> Var {
    let count = shape.iter().product::<usize>();
    let values: Vec<f32> = (0..count).map(|i| ((i * 37 + seed * 101) % 97) as f32 / 48.0 - 1.0).collect();
    Var::from_vec(values, shape, &Device::Cpu).unwrap()
}

/// Compares the gradients of `loss` with its change in a few places of each variable.
pub(super) fn check(vars: &[&Var], loss: impl Fn() -> Tensor) {
    let gradients = loss().backward().unwrap();
    for (n, var) in vars.iter().enumerate() {
        let gradient: Vec<f32> = gradients.get(var).unwrap().flatten_all().unwrap().to_vec1().unwrap();
        let at: Vec<f32> = var.flatten_all().unwrap().to_vec1().unwrap();
        let set = |values: Vec<f32>| var.set(&Tensor::from_vec(values, var.shape(), &Device::Cpu).unwrap()).unwrap();
        for place in (0..at.len()).step_by((at.len() / 9).max(1)) {
            let shifted = |by: f32| {
                let mut values = at.clone();
                values[place] += by;
                set(values);
                loss().to_scalar::<f32>().unwrap()
            };
            let (found, expected) = (gradient[place], (shifted(1e-2) - shifted(-1e-2)) / 2e-2);
            let is_near = (found - expected).abs() < 5e-3 * expected.abs().max(1.0);
            assert!(is_near, "variable {n} at {place}: {found}, not {expected}");
        }
        set(at);
    }
}

/// Half the squared distance to fixed targets.
pub(super) fn distance(found: &Tensor) -> Tensor {
    let targets = values(found.dims(), 99);
    ((found - targets.as_tensor()).unwrap().sqr().unwrap().sum_all().unwrap() * 0.5).unwrap()
}
