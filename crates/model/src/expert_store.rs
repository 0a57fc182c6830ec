//! Experts where they rest: in the files of a checkpoint. An expert-node copies one into a slot when it
//! is wanted; nothing else of the experts stays in memory.

use std::sync::Arc;

use sida_routing::{Digest, ExpertKey, Grouping, LayerId};

use crate::{
    Checkpoint, ModelConfig, ModelError, StoredDType,
    expert::{ExpertScratch, ExpertShape},
    names,
};

/// All experts of a model.
#[derive(Clone, Debug)]
pub struct ExpertStore {
    checkpoint: Arc<Checkpoint>,
    shape: ExpertShape,
}

impl ExpertStore {
    /// Checks, from headers alone, that every expert is there in the right shape.
    pub fn open(checkpoint: Arc<Checkpoint>) -> Result<Self, ModelError> {
        let config = checkpoint.config();
        let mut dtypes = Vec::new();
        for layer in (0..config.moe_layer_count() as u16).map(LayerId) {
            for expert in 0..config.num_experts as u16 {
                for (name, shape) in names::expert(config, ExpertKey { layer, expert: sida_routing::ExpertId(expert) })
                {
                    checkpoint.check_shape(&name, &shape)?;
                    dtypes.push(checkpoint.dtype(&name)?);
                }
            }
        }
        dtypes.dedup();
        // Slots hold one dtype: where a file mixes them, experts are widened on their way in.
        let dtype = if let [one] = dtypes[..] { one } else { StoredDType::F32 };
        let shape = ExpertShape { d_model: config.d_model, d_ff: config.d_ff, dtype };
        Ok(Self { checkpoint, shape })
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

    /// Asks for an expert to be read from disk ahead of [`ExpertStore::load`]. Only a hint.
    pub fn will_need(&self, key: ExpertKey) {
        if self.check(key).is_ok() {
            names::expert(self.config(), key).iter().for_each(|(name, _)| self.checkpoint.will_need(name));
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
        let matrices = slot.chunks_exact_mut(self.shape.matrix_bytes());
        for ((name, shape), matrix) in names::expert(self.config(), key).iter().zip(matrices) {
            if self.checkpoint.dtype(name)? == self.shape.dtype {
                self.checkpoint.read(name, matrix)?;
            } else {
                let mut widened = Vec::with_capacity(matrix.len());
                self.checkpoint.tensor_of_shape(name, shape)?.append_to(self.shape.dtype, &mut widened);
                matrix.copy_from_slice(&widened);
                self.checkpoint.release(name);
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
