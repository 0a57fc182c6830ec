//! How an expert lies in a slot of a GPU, and on its way there: its matrices one after the other, in the precision that is
//! computed in, packed where that can be (see [`crate::packed`]), or in the blocks of its checkpoint (see
//! [`crate::block_matrix`]). How they lie may differ by layer, and between the matrices that lead in and the one that leads out, as
//! it does in files; every slot has room for the largest.

use std::sync::Arc;

use sida_routing::{ExpertId, ExpertKey, LayerId};

use crate::{ExpertShape, ExpertStore, ModelError, Precision, StoredDType, block_matrix, packed, spec::Activation};

/// How the experts of a model lie in the slots of a device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExpertSlot {
    shape: ExpertShape,
    layers: Arc<[LayerLayouts]>,
    bytes: usize,
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

/// How the experts of a layer lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct LayerLayouts {
    /// All matrices that lead to what is between them, which are one to the device.
    pub(crate) inputs: Layout,
    /// The last matrix, which leads back to `d_model`.
    pub(crate) output: Layout,
    /// Where that begins.
    pub(crate) output_at: usize,
    /// Where it ends.
    bytes: usize,
}

impl Layout {
    /// Of weights that are stored so and computed in a precision, where they are not packed.
    pub(crate) fn of(stored: StoredDType, precision: Precision) -> Self {
        match stored.is_blocks() && precision == Precision::Bf16 {
            true => Self::Blocks(stored),
            false => Self::Plain,
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

    /// Bytes of a matrix of (outputs, k) that lies so.
    fn bytes(self, precision: Precision, outputs: usize, k: usize) -> usize {
        match self {
            Self::Plain => outputs * k * precision.size(),
            Self::Packed => packed::matrix_bytes(outputs, k),
            Self::Blocks(dtype) => block_matrix::bytes(dtype, outputs * k),
        }
    }

    /// Writes a matrix with rows of `k`, stored as `dtype`, as it lies so. False if it cannot be packed.
    fn put(self, stored: &[u8], dtype: StoredDType, precision: Precision, k: usize, to: &mut [u8]) -> bool {
        match self {
            Self::Blocks(format) => block_matrix::arrange(stored, format, k, to),
            Self::Plain if dtype == precision.stored() => to.copy_from_slice(stored),
            Self::Plain => precision.narrow(&dtype.widen(stored), to),
            Self::Packed if dtype == StoredDType::BF16 => return packed::pack(stored, k, to),
            Self::Packed => {
                let wide = dtype.widen(stored);
                let mut narrow = vec![0; precision.stored().bytes(wide.len())];
                precision.narrow(&wide, &mut narrow);
                return packed::pack(&narrow, k, to);
            }
        }
        true
    }
}

impl ExpertSlot {
    /// For the experts of a store. Computed in bf16, they lie in blocks where they are stored so; they are packed if that is
    /// wanted, none is in blocks, and the first expert of every layer can be: those of a layer are much alike.
    pub fn choose(store: &ExpertStore, precision: Precision, packs: bool) -> Result<Self, ModelError> {
        let plain = Self::unpacked(store, precision);
        let are_plain = plain.layouts().all(|layout| layout == Layout::Plain);
        if !packs || precision != Precision::Bf16 || !are_plain || plain.shape.activation != Activation::Relu {
            return Ok(plain);
        }
        let layers = plain.layers.len();
        let packed = Self::new(plain.shape, precision, vec![[Layout::Packed; 2]; layers]);
        let mut slot = vec![0; packed.bytes()];
        for layer in 0..layers as u16 {
            match packed.read(store, ExpertKey { layer: LayerId(layer), expert: ExpertId(0) }, &mut slot) {
                Ok(()) => {}
                Err(ModelError::NotPacked { .. }) => return Ok(plain),
                Err(error) => return Err(error),
            }
        }
        Ok(packed)
    }

    /// The same where none are packed.
    pub(crate) fn unpacked(store: &ExpertStore, precision: Precision) -> Self {
        let layers = (0..store.config().moe_layer_count() as u16).map(|layer| store.shape_of(LayerId(layer)));
        let layouts = layers.map(|shape| [shape.dtype, shape.output_dtype].map(|stored| Layout::of(stored, precision)));
        Self::new(*store.shape(), precision, layouts.collect())
    }

    fn new(shape: ExpertShape, precision: Precision, layouts: Vec<[Layout; 2]>) -> Self {
        let ExpertShape { d_model, d_ff, activation, .. } = shape;
        let layer = |[inputs, output]: [Layout; 2]| {
            let output_at = inputs.bytes(precision, (activation.matrices() - 1) * d_ff, d_model);
            LayerLayouts { inputs, output, output_at, bytes: output_at + output.bytes(precision, d_model, d_ff) }
        };
        let layers: Arc<[LayerLayouts]> = layouts.into_iter().map(layer).collect();
        let shape = shape.in_dtype(precision.stored());
        let bytes = layers.iter().map(|layer| layer.bytes).max().unwrap_or(shape.bytes());
        Self { shape, layers, bytes }
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
        self.layouts().any(|layout| layout == Layout::Packed)
    }

    /// How matrices lie, of each layer those that lead in and the one that leads out.
    pub(crate) fn layouts(&self) -> impl Iterator<Item = Layout> {
        self.layers.iter().flat_map(|layer| [layer.inputs, layer.output])
    }

    /// How the experts of a layer lie. Panics if there is no such layer.
    #[cfg(feature = "cuda")]
    pub(crate) fn of_layer(&self, layer: LayerId) -> LayerLayouts {
        self.layers[usize::from(layer.0)]
    }

    /// Bytes of a slot.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Bytes of the slot that an expert of a layer takes. Panics if there is no such layer.
    #[cfg(feature = "cuda")]
    pub(crate) fn bytes_of(&self, layer: LayerId) -> usize {
        self.layers[usize::from(layer.0)].bytes
    }

    /// Reads an expert as it lies in a slot.
    pub fn read(&self, store: &ExpertStore, key: ExpertKey, slot: &mut [u8]) -> Result<(), ModelError> {
        let LayerLayouts { inputs, output, output_at, bytes } = self.layers[usize::from(key.layer.0)];
        if [inputs, output] == [Layout::Plain; 2] && store.one_dtype() == Some(self.shape.dtype) {
            return store.load(key, slot);
        }
        let (shape, precision) = (store.shape_of(key.layer), self.precision());
        let mut read = vec![0; store.shape().bytes()];
        store.load(key, &mut read)?;
        let (stored_inputs, stored_output) = read[..shape.bytes()].split_at(shape.input_bytes());
        let (to_inputs, to_output) = slot[..bytes].split_at_mut(output_at);
        let is_put = inputs.put(stored_inputs, shape.dtype, precision, shape.d_model, to_inputs)
            && output.put(stored_output, shape.output_dtype, precision, shape.d_ff, to_output);
        if is_put { Ok(()) } else { Err(ModelError::NotPacked { key }) }
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
                assert_eq!(plain.layers[0].output_at * 2, plain.bytes());
            }
        }
    }
}
