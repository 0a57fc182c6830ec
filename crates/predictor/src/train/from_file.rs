//! What a net that learns on takes out of its file: weights as they are trained, and what it knows of each token, which takes
//! the place of the embedding that the file does not hold.

use candle_core::{DType, Device, Tensor, Var};

use super::{linear::Linear, lstm_net::zeros};
use crate::{PredictorError, file::PredictorFile};

/// What a net knows of each token, (vocabulary, token width), and what is learnt of that: at first nothing, so that the layer
/// is the identity.
pub(super) fn tokens(
    file: &mut PredictorFile,
    tensor: &str,
    token_width: usize,
) -> Result<(Tensor, Linear), PredictorError> {
    let vocab_size = file.shape.vocab_size;
    let known = file.floats(tensor, &[vocab_size, token_width])?;
    if known.iter().any(|&value| value < 0.0) {
        return Err(file.refuse(tensor, "holds what no ReLU gives: this net cannot learn on".to_owned()));
    }
    let weights = Var::from_tensor(&Tensor::eye(token_width, DType::F32, &Device::Cpu)?)?;
    let layer = Linear { weights, bias: zeros(token_width)? };
    Ok((Tensor::from_vec(known, (vocab_size, token_width), &Device::Cpu)?, layer))
}

/// A linear layer behind the width of a net: its weights are stored (outputs, width), its bias (outputs).
pub(super) fn head(
    file: &mut PredictorFile,
    stack: &str,
    (outputs, width): (usize, usize),
) -> Result<Linear, PredictorError> {
    let bias = file.floats(&format!("{stack}.head_bias"), &[outputs])?;
    Ok(Linear {
        weights: transposed(file, &format!("{stack}.head"), &[outputs, width])?,
        bias: Var::from_vec(bias, (1, outputs), &Device::Cpu)?,
    })
}

/// The two extents of a matrix.
pub(super) fn extent(file: &PredictorFile, tensor: &str) -> Result<(usize, usize), PredictorError> {
    match *file.dimensions(tensor)? {
        [rows, columns] => Ok((rows, columns)),
        ref found => Err(file.refuse(tensor, format!("is {found:?}, expected a matrix"))),
    }
}

/// A tensor of which all but the last extent are outputs, as weights (inputs, outputs).
pub(super) fn transposed(file: &mut PredictorFile, tensor: &str, shape: &[usize]) -> Result<Var, PredictorError> {
    let (values, inputs) = (file.floats(tensor, shape)?, shape[shape.len() - 1]);
    let stored = Tensor::from_vec(values, (shape.iter().product::<usize>() / inputs, inputs), &Device::Cpu)?;
    Ok(Var::from_tensor(&stored.t()?.contiguous()?)?)
}
