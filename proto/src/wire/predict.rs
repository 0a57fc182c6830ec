//! `PredictRequest` and `PredictResponse`, checked. The request is read by predictor-nodes, the response by
//! coordinators.

use bytes::Bytes;
use sida_routing::{Digest, HashTable};

use super::{Bounds, WireError, checksum, digest, length, within};
use crate::v1;

/// The most bytes of one sequence's predictor state: what a predictor of `sida_model` takes at the most.
pub const STATE_BYTES_MAX: usize = 4 << 20;

/// The half of the model that a prediction is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stack {
    /// All tokens at once, without state.
    Encoder,
    /// New tokens after a state.
    Decoder,
}

/// A checked request.
#[derive(Clone, Debug, PartialEq)]
pub struct PredictionRequest {
    /// The model the caller serves.
    pub model: Digest,
    /// Which half of it.
    pub stack: Stack,
    /// The tokens of each sequence; none is empty, and every id is below the vocabulary's size.
    pub sequences: Vec<Vec<u32>>,
    /// Decoder: the state of each sequence as the predictor wrote it, empty at its first token; the
    /// predictor checks it. Encoder: empty.
    pub states: Vec<Bytes>,
}

/// A checked response.
#[derive(Clone, Debug, PartialEq)]
pub struct Prediction {
    /// One per sequence.
    pub tables: Vec<HashTable>,
    /// Decoder: one per sequence. Encoder: empty.
    pub states: Vec<Bytes>,
}

impl v1::PredictRequest {
    /// Asks for `sequences` of one stack; `states` is empty for the encoder, else as long as `sequences`.
    pub fn new(model: Digest, stack: Stack, sequences: &[&[u32]], states: &[Bytes]) -> Self {
        let sequence = |(i, tokens): (usize, &&[u32])| v1::PredictSequence {
            token_ids: tokens.to_vec(),
            state: states.get(i).cloned().unwrap_or_default(),
        };
        let mut request = Self {
            model_digest: model.0.to_vec().into(),
            stack: v1::Stack::from(stack).into(),
            sequences: sequences.iter().enumerate().map(sequence).collect(),
            checksum: 0,
        };
        request.checksum = checksum::of_predict_request(&request);
        request
    }

    /// The request, if it is within `bounds`.
    pub fn check(self, bounds: &Bounds) -> Result<PredictionRequest, WireError> {
        let model = digest("PredictRequest.model_digest", &self.model_digest)?;
        let stack = match v1::Stack::try_from(self.stack) {
            Ok(v1::Stack::Encoder) => Stack::Encoder,
            Ok(v1::Stack::Decoder) => Stack::Decoder,
            _ => return Err(WireError::Kind { field: "PredictRequest.stack", found: self.stack }),
        };
        within("PredictRequest.sequences", self.sequences.len(), 1, bounds.sequences_max)?;
        let expected = checksum::of_predict_request(&self);
        let mut states = Vec::new();
        let mut sequences = Vec::with_capacity(self.sequences.len());
        for v1::PredictSequence { token_ids, state } in self.sequences {
            within("PredictSequence.token_ids", token_ids.len(), 1, bounds.tokens_max)?;
            if let Some(&id) = token_ids.iter().find(|&&id| id as usize >= bounds.vocab_size) {
                let (found, expected) = (id.into(), bounds.vocab_size as u64);
                return Err(WireError::Id { field: "PredictSequence.token_ids", found, expected });
            }
            match stack {
                Stack::Encoder => length("PredictSequence.state of an encoder call", "bytes", state.len(), 0)?,
                Stack::Decoder => {
                    within("PredictSequence.state (bytes)", state.len(), 0, STATE_BYTES_MAX)?;
                    states.push(state);
                }
            }
            sequences.push(token_ids);
        }
        checksum::undamaged("PredictRequest", self.checksum, expected)?;
        Ok(PredictionRequest { model, stack, sequences, states })
    }
}

impl v1::PredictResponse {
    /// Answers with a table per sequence; `states` is empty for the encoder.
    pub fn new(tables: &[HashTable], states: Vec<Bytes>) -> Self {
        let mut response = Self { tables: tables.iter().map(v1::HashTable::from).collect(), states, checksum: 0 };
        response.checksum = checksum::of_predict_response(&response);
        response
    }

    /// The prediction, if it answers a call for sequences of these lengths: a table of the stack's layers for
    /// each, with an entry for each token; and of this model.
    pub fn check(
        self,
        bounds: &Bounds,
        model: Digest,
        stack: Stack,
        layers: std::ops::Range<u16>,
        lengths: &[usize],
    ) -> Result<Prediction, WireError> {
        checksum::undamaged("PredictResponse", self.checksum, checksum::of_predict_response(&self))?;
        length("PredictResponse.tables", "tables", self.tables.len(), lengths.len())?;
        let states_expected = if stack == Stack::Decoder { lengths.len() } else { 0 };
        length("PredictResponse.states", "states", self.states.len(), states_expected)?;
        for state in &self.states {
            within("PredictResponse.states (bytes)", state.len(), 0, STATE_BYTES_MAX)?;
        }
        let mut tables = Vec::with_capacity(self.tables.len());
        for (table, &tokens) in self.tables.into_iter().zip(lengths) {
            let table = table.check(bounds)?;
            table.check_model(model)?;
            let shape = table.shape();
            length("HashTable.tokens", "tokens", shape.tokens, tokens)?;
            length("HashTable.layers", "layers", shape.layers, layers.len())?;
            let first_layer = usize::from(layers.start);
            within("HashTable.first_layer", usize::from(shape.first_layer.0), first_layer, first_layer)?;
            tables.push(table);
        }
        Ok(Prediction { tables, states: self.states })
    }
}

impl From<Stack> for v1::Stack {
    fn from(stack: Stack) -> Self {
        match stack {
            Stack::Encoder => Self::Encoder,
            Stack::Decoder => Self::Decoder,
        }
    }
}
