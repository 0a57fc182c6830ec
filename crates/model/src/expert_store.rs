//! Experts where they rest: in the files of a checkpoint. An expert-node copies one into a slot when it
//! is wanted; nothing else of the experts stays in memory.

use std::sync::Arc;

use sida_routing::{Digest, ExpertId, ExpertKey, Grouping, LayerId};

use crate::{
    Checkpoint, ModelConfig, ModelError, StoredDType,
    expert::{ExpertScratch, ExpertShape},
    names::ExpertPart,
};

/// All experts of a model.
#[derive(Clone, Debug)]
pub struct ExpertStore {
    checkpoint: Arc<Checkpoint>,
    shape: ExpertShape,
    /// Whether a tensor holds the experts of a layer.
    is_stacked: bool,
}

impl ExpertStore {
    /// Checks, from headers alone, that every expert is there in the right shape.
    pub fn open(checkpoint: Arc<Checkpoint>) -> Result<Self, ModelError> {
        let config = checkpoint.config();
        let is_stacked = is_stacked(&checkpoint);
        for layer in (0..config.moe_layer_count() as u16).map(LayerId) {
            for expert in (0..config.num_experts as u16).map(ExpertId) {
                for ExpertPart { tensor, shape, .. } in parts(config, is_stacked, ExpertKey { layer, expert }) {
                    checkpoint.check_shape(&tensor, &shape)?;
                }
            }
        }
        let dtype = Self::dtype(&checkpoint)?;
        let shape = ExpertShape { d_model: config.d_model, d_ff: config.d_ff, dtype, activation: config.activation };
        Ok(Self { checkpoint, shape, is_stacked })
    }

    /// What every expert of a checkpoint is stored as in a slot: where a file mixes dtypes, experts are widened on their way in.
    pub(crate) fn dtype(checkpoint: &Checkpoint) -> Result<StoredDType, ModelError> {
        let (config, is_stacked) = (checkpoint.config(), is_stacked(checkpoint));
        let mut dtypes = Vec::new();
        for layer in (0..config.moe_layer_count() as u16).map(LayerId) {
            for expert in (0..config.num_experts as u16).map(ExpertId) {
                for part in parts(config, is_stacked, ExpertKey { layer, expert }) {
                    dtypes.push(checkpoint.dtype(&part.tensor)?);
                }
            }
        }
        dtypes.dedup();
        Ok(if let [one] = dtypes[..] { one } else { StoredDType::F32 })
    }

    /// What every expert looks like in a slot.
    pub fn shape(&self) -> &ExpertShape {
        &self.shape
    }

    /// What the model is.
    pub fn config(&self) -> &ModelConfig {
        self.checkpoint.config()
    }

    /// Which model it is.
    pub fn digest(&self) -> Digest {
        self.checkpoint.digest()
    }

    /// Which experts these are: [`Checkpoint::experts_digest`].
    pub fn experts_digest(&self) -> Digest {
        self.checkpoint.experts_digest()
    }

    /// Asks for an expert to be read from disk ahead of [`ExpertStore::load`]. Only a hint.
    pub fn will_need(&self, key: ExpertKey) {
        if self.check(key).is_ok() {
            for part in parts(self.config(), self.is_stacked, key) {
                self.checkpoint.will_need(&part.tensor, part.share());
            }
        }
    }

    /// Copies an expert's matrices, one after another, into `slot` of [`ExpertShape::bytes`]. The first load of
    /// each tensor compares it with the manifest where there is one. Leaves nothing of it in memory but the slot.
    pub fn load(&self, key: ExpertKey, slot: &mut [u8]) -> Result<(), ModelError> {
        self.check(key)?;
        if slot.len() != self.shape.bytes() {
            let (expected, found) = (vec![self.shape.bytes()], vec![slot.len()]);
            return Err(ModelError::Shape { what: "slot [bytes]", expected, found });
        }
        let mut rest = slot;
        for part in parts(self.config(), self.is_stacked, key) {
            let matrix;
            (matrix, rest) = rest.split_at_mut(self.shape.dtype.bytes(part.values()));
            let stored = self.checkpoint.dtype(&part.tensor)?;
            if stored == self.shape.dtype {
                self.checkpoint.read(&part.tensor, part.share(), matrix)?;
            } else {
                let mut narrow = vec![0; stored.bytes(part.values())];
                self.checkpoint.read(&part.tensor, part.share(), &mut narrow)?;
                let wide = stored.widen(&narrow);
                matrix.as_chunks_mut().0.iter_mut().zip(wide).for_each(|(to, value)| *to = value.to_le_bytes());
            }
        }
        Ok(())
    }

    /// The weighted sum of each token's experts, loaded one by one: x (n, d_model) -> (n, d_model)
    pub fn combined(&self, layer: LayerId, x: &[f32], grouping: &Grouping) -> Result<Vec<f32>, ModelError> {
        let d_model = self.shape.d_model;
        let (mut slot, mut scratch) = (vec![0; self.shape.bytes()], ExpertScratch::default());
        let mut output = vec![0.0; x.len()];
        let mut first = 0;
        for group in &grouping.groups {
            let tokens = &grouping.tokens[first..][..group.rows as usize];
            let own: Vec<f32> = tokens.iter().flat_map(|&t| &x[t as usize * d_model..][..d_model]).copied().collect();
            let mut results = vec![0.0; own.len()];
            self.load(ExpertKey { layer, expert: group.expert }, &mut slot)?;
            self.shape.forward(&slot, &own, &mut results, &mut scratch);
            grouping.combine(first, &results, d_model, &mut output);
            first += tokens.len();
        }
        Ok(output)
    }

    fn check(&self, key: ExpertKey) -> Result<(), ModelError> {
        let (layers, num_experts) = (self.config().moe_layer_count(), self.config().num_experts);
        if usize::from(key.layer.0) < layers && usize::from(key.expert.0) < num_experts {
            return Ok(());
        }
        Err(ModelError::Expert { layer: key.layer, expert: key.expert.0, layers, num_experts })
    }
}

/// Whether a tensor holds the experts of a layer.
fn is_stacked(checkpoint: &Checkpoint) -> bool {
    let (config, first) = (checkpoint.config(), ExpertKey { layer: LayerId(0), expert: ExpertId(0) });
    config.moe_layer_count() > 0
        && config.names.stacked(config, first).iter().any(|part| checkpoint.contains(&part.tensor))
}

/// Where an expert's matrices are, in the order of its slot.
fn parts(config: &ModelConfig, is_stacked: bool, key: ExpertKey) -> Vec<ExpertPart> {
    match is_stacked {
        true => config.names.stacked(config, key),
        false => config.names.expert(config, key),
    }
}
