//! One LSTM layer in training, all its directions at once: a step is few operations on tensors, and each
//! of them costs the same however little it does.

use candle_core::{D, IndexOp, Result, Tensor, Var};
use candle_nn::ops::sigmoid;

use super::linear::Linear;

/// A layer over sequences of equal length, all starting from zeros. Gates are in the order i, f, g, o.
pub(super) struct LstmLayer {
    /// (directions, width, 4 side)
    pub(super) input: Linear,
    /// (directions, side, 4 side)
    pub(super) hidden: Var,
}

impl LstmLayer {
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
        let hidden = Tensor::stack(&self.scan(&gates)?, 1)?; // (directions, steps, sequences, side)
        match directions {
            1 => hidden.squeeze(0),
            _ => Tensor::cat(&[hidden.i(0)?, hidden.i(1)?.flip(&[0])?], D::Minus1),
        }
    }

    /// The hidden state (directions, sequences, side) after each step; gates (directions, steps, sequences,
    /// 4 side) are the sums from the input.
    fn scan(&self, gates: &Tensor) -> Result<Vec<Tensor>> {
        let (directions, steps, sequences, _) = gates.dims4()?;
        let side = self.hidden.dim(1)?;
        let mut hidden = Tensor::zeros((directions, sequences, side), gates.dtype(), gates.device())?;
        let mut cell = hidden.clone();
        let mut outputs = Vec::with_capacity(steps);
        for from_input in split(gates)? {
            let gates = (from_input + hidden.matmul(&self.hidden)?)?;
            let open = sigmoid(&gates)?;
            let [i, f, o] = [0, 1, 3].map(|gate| open.narrow(2, gate * side, side));
            let g = gates.narrow(2, 2 * side, side)?.tanh()?;
            cell = ((f? * &cell)? + (i? * g)?)?;
            hidden = (o? * cell.tanh()?)?;
            outputs.push(hidden.clone());
        }
        Ok(outputs)
    }
}

/// The steps of (directions, steps, sequences, n), each (directions, sequences, n). Cut in halves again and
/// again, as the gradient of a piece is as large as what it was cut from: of n steps cut from the whole
/// that would be n times the whole.
fn split(gates: &Tensor) -> Result<Vec<Tensor>> {
    let steps = gates.dim(1)?;
    if steps == 1 {
        return Ok(vec![gates.squeeze(1)?.contiguous()?]);
    }
    let middle = steps / 2;
    let mut first = split(&gates.narrow(1, 0, middle)?)?;
    first.extend(split(&gates.narrow(1, middle, steps - middle)?)?);
    Ok(first)
}

#[cfg(test)]
mod tests {
    use super::{super::finite_differences::*, *};

    /// Training would go in some other direction than down.
    #[test]
    fn gradients_are_those_of_finite_differences() {
        for directions in [1, 2] {
            let input = Linear { weights: values(&[directions, 4, 12], 1), bias: values(&[directions, 1, 12], 2) };
            let layer = LstmLayer { input, hidden: values(&[directions, 3, 12], 3) };
            let x = values(&[5, 2, 4], 4);
            let vars = [&x, &layer.input.weights, &layer.input.bias, &layer.hidden];
            check(&vars, || distance(&layer.forward(&x).unwrap()));
        }
    }
}
