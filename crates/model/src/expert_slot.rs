//! How an expert lies in a slot of a GPU, and on its way there: its matrices one after the other, in the precision that is
//! computed in, packed where that can be (see [`crate::packed`]), or in the blocks of its checkpoint (see
//! [`crate::block_matrix`]).

use sida_routing::{ExpertId, ExpertKey, LayerId};

use crate::{ExpertShape, ExpertStore, ModelError, Precision, StoredDType, block_matrix, packed, spec::Activation};

/// How the experts of a model lie in the slots of a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ExpertSlot {
    shape: ExpertShape,
    layout: Layout,
}

/// How a matrix lies in a slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Layout {
    /// As values that are computed with.
    Plain,
    /// As bf16 values in three quarters of their bytes.
    Packed,
    /// As blocks of this format.
    Blocks(StoredDType),
}

impl Layout {
    /// Of weights that are all stored so, if in one way, and computed in a precision, where they are not packed.
    pub(crate) fn of(stored: Option<StoredDType>, precision: Precision) -> Self {
        match stored.filter(|&dtype| block_matrix::integer_bits(dtype).is_some()) {
            Some(dtype) if precision == Precision::Bf16 => Self::Blocks(dtype),
            _ => Self::Plain,
        }
    }

    /// Which format's kernels that takes, if any.
    #[cfg(feature = "cuda")]
    pub(crate) fn format(self) -> Option<StoredDType> {
        match self {
            Self::Plain | Self::Packed => None,
            Self::Blocks(dtype) => Some(dtype),
        }
    }
}

impl ExpertSlot {
    /// For the experts of a store. Computed in bf16, they lie in blocks where they are stored so; they are packed if that is
    /// wanted and the first expert of every layer can be: those of a layer are much alike.
    pub fn choose(store: &ExpertStore, precision: Precision, packs: bool) -> Result<Self, ModelError> {
        let shape = store.shape().in_dtype(precision.stored());
        let plain = Self { shape, layout: Layout::of(store.one_dtype(), precision) };
        if !packs || precision != Precision::Bf16 || plain.layout != Layout::Plain {
            return Ok(plain);
        }
        if shape.activation != Activation::Relu {
            return Ok(plain);
        }
        let packed = Self { layout: Layout::Packed, ..plain };
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
        self.layout == Layout::Packed
    }

    /// How its matrices lie.
    #[cfg(feature = "cuda")]
    pub(crate) fn layout(&self) -> Layout {
        self.layout
    }

    /// Bytes it takes.
    pub fn bytes(&self) -> usize {
        match self.layout {
            Layout::Plain => self.shape.bytes(),
            Layout::Packed => self.packed_bytes().iter().sum(),
            Layout::Blocks(dtype) => self.shape.in_dtype(dtype).bytes(),
        }
    }

    /// Where its last matrix begins, which leads back to `d_model`.
    pub fn output_at(&self) -> usize {
        match self.layout {
            Layout::Plain => self.shape.input_bytes(),
            Layout::Packed => self.packed_bytes()[0],
            Layout::Blocks(dtype) => self.shape.in_dtype(dtype).input_bytes(),
        }
    }

    /// From one slot to the next, as kernels count: values of plain ones, else bytes.
    pub fn stride(&self) -> u64 {
        let unit = if self.layout == Layout::Plain { self.precision().size() } else { 1 };
        (self.bytes() / unit) as u64
    }

    /// Reads an expert as it lies in a slot.
    pub fn read(&self, store: &ExpertStore, key: ExpertKey, slot: &mut [u8]) -> Result<(), ModelError> {
        let ExpertShape { d_model, d_ff, .. } = self.shape;
        let is_stored_so = store.one_dtype() == Some(self.shape.dtype);
        if self.layout == Layout::Plain && is_stored_so {
            return store.load(key, slot);
        }
        let mut read = vec![0; store.shape().bytes()];
        store.load(key, &mut read)?;
        // All matrices that lead to what is between them are one to the device.
        let (inputs, output) = slot.split_at_mut(self.output_at());
        match self.layout {
            Layout::Plain => self.precision().narrow(&store.shape_of(key.layer).widen(&read), slot),
            Layout::Blocks(dtype) => {
                let (stored_inputs, stored_output) = read.split_at(self.output_at());
                block_matrix::arrange(stored_inputs, dtype, d_model, inputs);
                block_matrix::arrange(stored_output, dtype, d_ff, output);
            }
            Layout::Packed => {
                if !is_stored_so {
                    let wide = store.shape_of(key.layer).widen(&read);
                    read.resize(self.shape.bytes(), 0);
                    self.precision().narrow(&wide, &mut read);
                }
                let (wi, wo) = read.split_at(self.shape.input_bytes());
                if !(packed::pack(wi, d_model, inputs) && packed::pack(wo, d_ff, output)) {
                    return Err(ModelError::NotPacked { key });
                }
            }
        }
        Ok(())
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
