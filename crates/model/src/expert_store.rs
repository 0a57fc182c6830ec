//! Experts where they rest: in the files of a checkpoint. An expert-node copies one into a slot when it
//! is wanted; nothing else of the experts stays in memory.

use std::sync::Arc;

use sida_routing::{Digest, ExpertId, ExpertKey, Grouping, LayerId};

use crate::{
    Checkpoint, ModelConfig, ModelError, Precision, StoredDType,
    expert::{ExpertScratch, ExpertShape},
    names::ExpertPart,
};

/// All experts of a model.
#[derive(Clone, Debug)]
pub struct ExpertStore {
    checkpoint: Arc<Checkpoint>,
    /// Of the layers.
    shapes: Vec<ExpertShape>,
    /// The one of those that takes most.
    largest: ExpertShape,
    /// Whether a tensor holds the experts of a layer.
    is_stacked: bool,
}

impl ExpertStore {
    /// Checks, from headers alone, that every expert is there in the right shape.
    pub fn open(checkpoint: Arc<Checkpoint>) -> Result<Self, ModelError> {
        let is_stacked = is_stacked(&checkpoint);
        let shapes = shapes(&checkpoint, is_stacked)?;
        let largest = shapes.iter().copied().max_by_key(ExpertShape::bytes).unwrap_or(plain(checkpoint.config()));
        Ok(Self { checkpoint, shapes, largest, is_stacked })
    }

    /// How matrices of experts of a checkpoint are stored.
    #[cfg(feature = "cuda")]
    pub(crate) fn dtypes_of(checkpoint: &Checkpoint) -> Result<Vec<StoredDType>, ModelError> {
        let shapes = shapes(checkpoint, is_stacked(checkpoint))?;
        Ok(shapes.iter().flat_map(|shape| [shape.dtype, shape.output_dtype]).collect())
    }

    /// What the largest expert looks like in a slot: every slot has room for it.
    pub fn shape(&self) -> &ExpertShape {
        &self.largest
    }

    /// What the experts of a layer look like in a slot. Panics if there is no such layer.
    pub fn shape_of(&self, layer: LayerId) -> &ExpertShape {
        &self.shapes[usize::from(layer.0)]
    }

    /// How all weights of all experts are stored, if that is one way.
    pub fn one_dtype(&self) -> Option<StoredDType> {
        one_dtype(&self.shapes)
    }

    /// What loses nothing of any of them on a device: see [`Precision::of_weights`].
    pub fn precision(&self) -> Precision {
        let dtypes = self.shapes.iter().flat_map(|shape| [shape.dtype, shape.output_dtype]);
        let is_wide = |dtype| Precision::of_weights(dtype) == Precision::F32;
        if self.shapes.is_empty() || dtypes.into_iter().any(is_wide) { Precision::F32 } else { Precision::Bf16 }
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

    /// Copies an expert's matrices, one after another, to the beginning of `slot`, which has the [`ExpertShape::bytes`] of
    /// [`ExpertStore::shape`]. The first load of each tensor compares it with the manifest where there is one. Leaves
    /// nothing of it in memory but the slot.
    pub fn load(&self, key: ExpertKey, slot: &mut [u8]) -> Result<(), ModelError> {
        self.check(key)?;
        if slot.len() != self.largest.bytes() {
            let (expected, found) = (vec![self.largest.bytes()], vec![slot.len()]);
            return Err(ModelError::Shape { what: "slot [bytes]", expected, found });
        }
        let shape = self.shape_of(key.layer);
        let mut rest = slot;
        let mut parts = parts(self.config(), self.is_stacked, key).into_iter().peekable();
        while let Some(part) = parts.next() {
            let wanted = if parts.peek().is_some() { shape.dtype } else { shape.output_dtype };
            let matrix;
            (matrix, rest) = rest.split_at_mut(wanted.bytes(part.values()));
            let stored = self.checkpoint.dtype(&part.tensor)?;
            if stored == wanted {
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
        let shape = self.shape_of(layer);
        let d_model = shape.d_model;
        let (mut slot, mut scratch) = (vec![0; self.largest.bytes()], ExpertScratch::default());
        let mut output = vec![0.0; x.len()];
        let mut first = 0;
        for group in &grouping.groups {
            let tokens = &grouping.tokens[first..][..group.rows as usize];
            let own: Vec<f32> = tokens.iter().flat_map(|&t| &x[t as usize * d_model..][..d_model]).copied().collect();
            let mut results = vec![0.0; own.len()];
            self.load(ExpertKey { layer, expert: group.expert }, &mut slot)?;
            shape.forward(&slot, &own, &mut results, &mut scratch);
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

/// What the experts of each layer look like in a slot, from headers alone. Refused where one is missing or has another shape.
fn shapes(checkpoint: &Checkpoint, is_stacked: bool) -> Result<Vec<ExpertShape>, ModelError> {
    let config = checkpoint.config();
    let shape = |layer| {
        let (mut inputs, mut outputs) = (Vec::new(), Vec::new());
        for expert in (0..config.num_experts as u16).map(ExpertId) {
            let mut parts = parts(config, is_stacked, ExpertKey { layer, expert });
            for ExpertPart { tensor, shape, .. } in &parts {
                checkpoint.check_shape(tensor, shape)?;
            }
            let last = parts.pop().expect("an expert has matrices");
            outputs.push(checkpoint.dtype(&last.tensor)?);
            for part in &parts {
                inputs.push(checkpoint.dtype(&part.tensor)?);
            }
        }
        Ok(ExpertShape { dtype: one(inputs), output_dtype: one(outputs), ..plain(config) })
    };
    (0..config.moe_layer_count() as u16).map(LayerId).map(shape).collect()
}

/// How all weights are stored of experts that look so, if that is one way.
fn one_dtype(shapes: &[ExpertShape]) -> Option<StoredDType> {
    let first = shapes.first()?;
    first.one_dtype().filter(|_| shapes.iter().all(|shape| shape == first))
}

/// An expert of a model whose files say nothing of how it is stored.
fn plain(config: &ModelConfig) -> ExpertShape {
    ExpertShape {
        d_model: config.d_model,
        d_ff: config.d_ff,
        dtype: StoredDType::F32,
        output_dtype: StoredDType::F32,
        activation: config.activation,
    }
}

/// What all are stored as in a slot: where a file mixes dtypes within a layer, experts are widened on their way in.
fn one(mut dtypes: Vec<StoredDType>) -> StoredDType {
    dtypes.dedup();
    if let [one] = dtypes[..] { one } else { StoredDType::F32 }
}

/// Where an expert's matrices are, in the order of its slot.
fn parts(config: &ModelConfig, is_stacked: bool, key: ExpertKey) -> Vec<ExpertPart> {
    match is_stacked {
        true => config.names.stacked(config, key),
        false => config.names.expert(config, key),
    }
}
