//! How an expert lies in a slot of a GPU, and on its way there: its matrices one after the other in the precision that is
//! computed in, packed where that can be (see [`crate::packed`]).

use sida_routing::{ExpertId, ExpertKey, LayerId};

use crate::{ExpertShape, ExpertStore, ModelError, Precision, packed, spec::Activation};

/// How the experts of a model lie in the slots of a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ExpertSlot {
    shape: ExpertShape,
    is_packed: bool,
}

impl ExpertSlot {
    /// For the experts of a store. Packed if that is wanted, they are computed in bf16, and the first expert of every layer can
    /// be: those of a layer are much alike.
    pub fn choose(store: &ExpertStore, precision: Precision, packs: bool) -> Result<Self, ModelError> {
        let shape = store.shape().in_dtype(precision.stored());
        let plain = Self { shape, is_packed: false };
        if !packs || precision != Precision::Bf16 {
            return Ok(plain);
        }
        if shape.activation != Activation::Relu {
            return Ok(plain);
        }
        let packed = Self { is_packed: true, ..plain };
        let mut slot = vec![0; packed.bytes()];
        for layer in 0..store.config().moe_layer_count() as u16 {
            match packed.read(store, ExpertKey { layer: LayerId(layer), expert: ExpertId(0) }, &mut slot) {
                Ok(()) => {}
                Err(ModelError::NotPacked { .. }) => return Ok(plain),
                Err(error) => return Err(error),
            }
        }
        Ok(packed)
    }

    /// The shape of its expert, in the dtype that is computed in.
    pub fn shape(&self) -> &ExpertShape {
        &self.shape
    }

    /// What is computed in.
    pub fn precision(&self) -> Precision {
        Precision::of_weights(self.shape.dtype)
    }

    /// Whether it is packed.
    pub fn is_packed(&self) -> bool {
        self.is_packed
    }

    /// Bytes it takes.
    pub fn bytes(&self) -> usize {
        match self.is_packed {
            true => self.packed_bytes().iter().sum(),
            false => self.shape.bytes(),
        }
    }

    /// Where its last matrix begins, which leads back to `d_model`.
    pub fn output_at(&self) -> usize {
        if self.is_packed { self.packed_bytes()[0] } else { self.shape.bytes() - self.shape.matrix_bytes() }
    }

    /// From one slot to the next, as kernels count: bytes of packed ones, else values.
    pub fn stride(&self) -> u64 {
        (if self.is_packed { self.bytes() } else { self.bytes() / self.precision().size() }) as u64
    }

    /// Reads an expert as it lies in a slot.
    pub fn read(&self, store: &ExpertStore, key: ExpertKey, slot: &mut [u8]) -> Result<(), ModelError> {
        let is_stored_so = store.one_dtype() == Some(self.shape.dtype);
        if !self.is_packed && is_stored_so {
            return store.load(key, slot);
        }
        let mut read = vec![0; store.shape().bytes()];
        store.load(key, &mut read)?;
        if !self.is_packed {
            self.precision().narrow(&store.shape_of(key.layer).widen(&read), slot);
            return Ok(());
        }
        if !is_stored_so {
            let wide = store.shape_of(key.layer).widen(&read);
            read.resize(self.shape.bytes(), 0);
            self.precision().narrow(&wide, &mut read);
        }
        let ExpertShape { d_model, d_ff, .. } = self.shape;
        let (wi, wo) = read.split_at(self.shape.matrix_bytes());
        let (wi_packed, wo_packed) = slot.split_at_mut(self.output_at());
        match packed::pack(wi, d_model, wi_packed) && packed::pack(wo, d_ff, wo_packed) {
            true => Ok(()),
            false => Err(ModelError::NotPacked { key }),
        }
    }

    fn packed_bytes(&self) -> [usize; 2] {
        let ExpertShape { d_model, d_ff, .. } = self.shape;
        [packed::matrix_bytes(d_ff, d_model), packed::matrix_bytes(d_model, d_ff)]
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::Checkpoint;

    /// Experts as they are trained would be refused, or lie over each other.
    #[test]
    fn trained_experts_are_packed() {
        for model in ["switch-tiny-64", "switch-mini-8"] {
            let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models").join(model);
            let store = ExpertStore::open(Checkpoint::open(&dir).unwrap()).unwrap();
            let slot = ExpertSlot::choose(&store, Precision::Bf16, true).unwrap();
            assert!(slot.is_packed() && slot.bytes() * 10 < slot.shape().bytes() * 9, "{model}: {slot:?}");
            let mut bytes = vec![0; slot.bytes()];
            for layer in (0..store.config().moe_layer_count() as u16).map(LayerId) {
                for expert in (0..store.config().num_experts as u16).map(ExpertId) {
                    slot.read(&store, ExpertKey { layer, expert }, &mut bytes).unwrap();
                }
            }
            for (precision, packs) in [(Precision::Bf16, false), (Precision::F32, true)] {
                let plain = ExpertSlot::choose(&store, precision, packs).unwrap();
                assert!(!plain.is_packed() && plain.bytes() == plain.shape().bytes());
                assert_eq!(plain.output_at() * 2, plain.bytes());
            }
        }
    }
}
