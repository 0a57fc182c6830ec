//! What a predictor remembers of one sequence between two decoding steps. It travels to a remote
//! predictor-node and back, so it can be bytes; what a net keeps of the sequence's input stays where it was made.

use std::sync::Arc;

use crate::{PredictorError, lstm::input_attention::InputMemory};

/// A state of more values is refused: four vectors and a window of outputs at the largest width allowed.
const VALUES_MAX: usize = 1 << 20;

/// A sequence's memory. The default is the state before the first token, for every net.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct PredictorState {
    /// What they mean is the net's; it checks how many there are.
    /// Invariant: finite, at most `VALUES_MAX`.
    pub(crate) values: Vec<f32>,
    /// What the net keeps of the input, if it reads it. It never changes, and branches of a sequence share it.
    pub(crate) input: Option<Arc<InputMemory>>,
}

impl PredictorState {
    /// Little-endian float32. Without what is kept of the input: the state of a net that reads it does not travel.
    pub fn to_bytes(&self) -> Vec<u8> {
        self.values.iter().flat_map(|value| value.to_le_bytes()).collect()
    }

    /// The state behind [`PredictorState::to_bytes`]. Which net it belongs to shows when it is used.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, PredictorError> {
        let refuse = |reason: String| PredictorError::State { reason };
        if bytes.len() > VALUES_MAX * 4 {
            return Err(refuse(format!("has {} bytes, more than the {} allowed", bytes.len(), VALUES_MAX * 4)));
        }
        let (values, []) = bytes.as_chunks::<4>() else {
            return Err(refuse(format!("has {} bytes, which is no multiple of 4", bytes.len())));
        };
        let values: Vec<f32> = values.iter().map(|&value| f32::from_le_bytes(value)).collect();
        if values.iter().any(|value| !value.is_finite()) {
            return Err(refuse("holds a value that is not finite".to_owned()));
        }
        Ok(Self { values, input: None })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A state would change on its way to a predictor-node, or a hostile one would get in.
    #[test]
    fn travels_as_bytes() {
        let state = PredictorState { values: vec![1.5, -0.25, 0.0], input: None };
        assert_eq!(PredictorState::from_bytes(&state.to_bytes()).unwrap(), state);
        assert_eq!(PredictorState::from_bytes(&[]).unwrap(), PredictorState::default());
        assert!(PredictorState::from_bytes(&[0; 5]).is_err());
        assert!(PredictorState::from_bytes(&f32::NAN.to_le_bytes()).is_err());
        assert!(PredictorState::from_bytes(&vec![0; VALUES_MAX * 4 + 4]).is_err());
    }
}
