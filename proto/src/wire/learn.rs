//! `LearnRequest`, checked. Sent by coordinators, read by predictor-nodes that learn.

use sida_routing::{Digest, ExpertId, Labels, LabelsExtent};

use super::{Bounds, Stack, WireError, checksum, digest, length, rows, within};
use crate::v1;

/// Bytes of one expert id.
const ID_BYTES: usize = size_of::<u16>();

/// Checked labels.
#[derive(Clone, Debug, PartialEq)]
pub struct TakenLabels {
    /// The model whose routers chose.
    pub model: Digest,
    /// Which half of it.
    pub stack: Stack,
    /// Those of each sequence; none is empty, and every id is below the vocabulary's size.
    pub sequences: Vec<Labels>,
}

impl v1::LearnRequest {
    /// Gives the labels of some sequences, which keep equally many experts.
    pub fn new(model: Digest, stack: Stack, sequences: &[Labels]) -> Self {
        let sequence = |labels: &Labels| v1::LabelledSequence {
            token_ids: labels.tokens().to_vec(),
            experts: labels.experts().iter().flat_map(|expert| expert.0.to_le_bytes()).collect(),
            probabilities: rows::to_payload(labels.probabilities()),
        };
        let mut request = Self {
            model_digest: model.0.to_vec().into(),
            stack: v1::Stack::from(stack).into(),
            kept: sequences.first().map_or(0, |labels| labels.kept() as u32),
            sequences: sequences.iter().map(sequence).collect(),
            checksum: 0,
        };
        request.checksum = checksum::of_learn_request(&request);
        request
    }

    /// The labels, if they are within `bounds` and of a stack of so many MoE `layers`.
    pub fn check(self, bounds: &Bounds, layers: usize) -> Result<TakenLabels, WireError> {
        checksum::undamaged("LearnRequest", self.checksum, checksum::of_learn_request(&self))?;
        let model = digest("LearnRequest.model_digest", &self.model_digest)?;
        let stack = match v1::Stack::try_from(self.stack) {
            Ok(v1::Stack::Encoder) => Stack::Encoder,
            Ok(v1::Stack::Decoder) => Stack::Decoder,
            _ => return Err(WireError::Kind { field: "LearnRequest.stack", found: self.stack }),
        };
        within("LearnRequest.sequences", self.sequences.len(), 1, bounds.sequences_max)?;
        let extent = LabelsExtent { layers, num_experts: bounds.num_experts, kept: self.kept as usize };
        let sequence = |v1::LabelledSequence { token_ids, experts, probabilities }| {
            within("LabelledSequence.token_ids", token_ids.len(), 1, bounds.tokens_max)?;
            if let Some(&id) = token_ids.iter().find(|&&id| id as usize >= bounds.vocab_size) {
                let (found, expected) = (id.into(), bounds.vocab_size as u64);
                return Err(WireError::Id { field: "LabelledSequence.token_ids", found, expected });
            }
            // Each factor is bounded, but `kept`, which the sender claims.
            let entries = token_ids.len().saturating_mul(layers).saturating_mul(extent.kept);
            length("LabelledSequence.experts", "bytes", experts.len(), entries.saturating_mul(ID_BYTES))?;
            let bytes = entries.saturating_mul(rows::VALUE_BYTES);
            length("LabelledSequence.probabilities", "bytes", probabilities.len(), bytes)?;
            let id = |bytes: &[u8]| ExpertId(u16::from_le_bytes([bytes[0], bytes[1]]));
            let experts = experts.chunks_exact(ID_BYTES).map(id).collect();
            Ok(Labels::new(token_ids, extent, experts, rows::from_payload(&probabilities))?)
        };
        let sequences = self.sequences.into_iter().map(sequence).collect::<Result<_, WireError>>()?;
        Ok(TakenLabels { model, stack, sequences })
    }
}
