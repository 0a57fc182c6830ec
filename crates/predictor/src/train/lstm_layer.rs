//! One LSTM layer in training.

use candle_core::{D, Device, IndexOp, Result, Tensor, Var};

use super::{from_file::transposed, linear::Linear, recurrence::recur};
use crate::{PredictorError, file::PredictorFile};

/// A layer over sequences of equal length, all starting from zeros. Gates are in the order i, f, g, o.
pub(super) struct LstmLayer {
    /// (directions, width, 4 side)
    pub(super) input: Linear,
    /// (directions, 4 side, side)
    pub(super) hidden: Var,
}

impl LstmLayer {
    /// Takes a layer out of a file: its `directions`, each so wide, of so many inputs.
    pub(super) fn from_file(
        file: &mut PredictorFile,
        layer: &str,
        directions: &[&str],
        (inputs, side): (usize, usize),
    ) -> std::result::Result<Self, PredictorError> {
        let (mut input, mut hidden, mut biases) = (Vec::new(), Vec::new(), Vec::new());
        for direction in directions {
            let part = |name: &str| format!("{layer}.{direction}.{name}");
            input.push(transposed(file, &part("input"), &[4 * side, inputs])?.into_inner());
            hidden.extend(file.floats(&part("hidden"), &[4 * side, side])?);
            biases.extend(file.floats(&part("bias"), &[4 * side])?);
        }
        let count = directions.len();
        let bias = Var::from_vec(biases, (count, 1, 4 * side), &Device::Cpu)?;
        let weights = Var::from_tensor(&Tensor::stack(&input, 0)?)?;
        let hidden = Var::from_vec(hidden, (count, 4 * side, side), &Device::Cpu)?;
        Ok(Self { input: Linear { weights, bias }, hidden })
    }

    /// x (steps, sequences, width) -> (steps, sequences, directions x side).
    pub(super) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let (steps, sequences, width) = x.dims3()?;
        let directions = self.hidden.dim(0)?;
        // The second direction reads the steps from the last to the first.
        let x = match directions {
            1 => x.unsqueeze(0)?,
            _ => Tensor::stack(&[x, &x.flip(&[0])?], 0)?,
        };
        let gates = self.input.forward(&x.reshape((directions, steps * sequences, width))?)?;
        let gates = gates.reshape((directions, steps, sequences, ()))?;
        let hidden = recur(&gates, &self.hidden)?; // (directions, steps, sequences, side)
        match directions {
            1 => hidden.squeeze(0),
            _ => Tensor::cat(&[hidden.i(0)?, hidden.i(1)?.flip(&[0])?], D::Minus1),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{super::finite_differences::*, *};

    /// Training would go in some other direction than down.
    #[test]
    fn gradients_are_those_of_finite_differences() {
        for directions in [1, 2] {
            let input = Linear { weights: values(&[directions, 4, 12], 1), bias: values(&[directions, 1, 12], 2) };
            let layer = LstmLayer { input, hidden: values(&[directions, 12, 3], 3) };
            let x = values(&[5, 2, 4], 4);
            let vars = [&x, &layer.input.weights, &layer.input.bias, &layer.hidden];
            check(&vars, || distance(&layer.forward(&x).unwrap()));
        }
    }
}
