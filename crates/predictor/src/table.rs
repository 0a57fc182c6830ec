//! A predefined hash (Hash Layers, Roller et al. 2021): the experts that a token id activated most often
//! while routing was recorded. It knows no context, costs one look-up per token, and needs no state.

use half::f16;
use sida_model::Stack;
use sida_routing::{Digest, ExpertId, HashTable};

use crate::{
    HashPredictor, PredictorError, PredictorShape, PredictorState,
    entries::Entries,
    file::{HitRate, Metadata, Net, PredictorFile, Tensors},
    stack_name,
};

/// Looks up every token.
pub struct TablePredictor {
    digest: Digest,
    metadata: Metadata,
    shape: PredictorShape,
    encoder: StackTable,
    decoder: StackTable,
}

/// The table of one stack.
pub(crate) struct StackTable {
    /// (vocabulary, layers, k). Tokens that were never seen have the layer's most frequent experts.
    pub(crate) experts: Vec<ExpertId>,
    /// (vocabulary, layers, k): the mean router probability of the expert when it was chosen.
    pub(crate) alphas: Vec<f32>,
}

impl StackTable {
    fn from_file(file: &mut PredictorFile, stack: Stack) -> Result<Self, PredictorError> {
        let layers = file.shape.layers(stack).len();
        if layers == 0 {
            return Ok(Self { experts: Vec::new(), alphas: Vec::new() });
        }
        let extent = [file.shape.vocab_size, layers, file.metadata.top_k];
        let (experts, alphas) = (format!("{}.experts", stack_name(stack)), format!("{}.alphas", stack_name(stack)));
        let ids = file.integers(&experts, &extent)?;
        let num_experts = file.shape.num_experts;
        if let Some(id) = ids.iter().find(|&&id| usize::from(id) >= num_experts) {
            return Err(file.refuse(&experts, format!("names expert {id}, the model has {num_experts} per layer")));
        }
        let values: Vec<f32> = file.halves(&alphas, &extent)?.into_iter().map(f16::to_f32).collect();
        if let Some(alpha) = values.iter().find(|alpha| !(0.0..=1.0).contains(*alpha)) {
            return Err(file.refuse(&alphas, format!("holds {alpha}, expected a probability in [0, 1]")));
        }
        Ok(Self { experts: ids.into_iter().map(ExpertId).collect(), alphas: values })
    }

    /// Adds it to a file that is about to be written.
    pub(crate) fn store(&self, stack: Stack, shape: &PredictorShape, top_k: usize, tensors: &mut Tensors) {
        let layers = shape.layers(stack).len();
        if layers > 0 {
            let extent = [shape.vocab_size, layers, top_k];
            let ids: Vec<u16> = self.experts.iter().map(|expert| expert.0).collect();
            tensors.integers(&format!("{}.experts", stack_name(stack)), &extent, &ids);
            tensors.floats(&format!("{}.alphas", stack_name(stack)), &extent, &self.alphas);
        }
    }
}

impl TablePredictor {
    /// Takes the tables out of a file; checks every entry.
    pub fn from_file(mut file: PredictorFile) -> Result<Self, PredictorError> {
        let encoder = StackTable::from_file(&mut file, Stack::Encoder)?;
        let decoder = StackTable::from_file(&mut file, Stack::Decoder)?;
        file.finish()?;
        Ok(Self { digest: file.digest, metadata: file.metadata, shape: file.shape, encoder, decoder })
    }

    fn look_up(&self, stack: Stack, sequences: &[&[u32]]) -> Result<Vec<HashTable>, PredictorError> {
        self.shape.check_tokens(sequences)?;
        let table = match stack {
            Stack::Encoder => &self.encoder,
            Stack::Decoder => &self.decoder,
        };
        let (layers, k) = (self.shape.layers(stack), self.metadata.top_k);
        let per_token = layers.len() * k;
        let ids: Vec<u32> = sequences.concat();
        let entries = Entries {
            model: self.metadata.model,
            predictor: self.digest,
            layers,
            num_experts: self.shape.num_experts,
            top_k: k,
            calibrations: self.metadata.calibrations_of(&self.shape, stack),
        };
        entries.tables(sequences.iter().map(|tokens| tokens.len()), |row, layer| {
            let start = ids[row] as usize * per_token + layer * k;
            (&table.experts[start..start + k], &table.alphas[start..start + k])
        })
    }
}

impl HashPredictor for TablePredictor {
    fn net(&self) -> &str {
        Net::Table.name()
    }

    fn digest(&self) -> Digest {
        self.digest
    }

    fn top_k(&self) -> usize {
        self.metadata.top_k
    }

    fn model_digest(&self) -> Digest {
        self.metadata.model
    }

    fn hit_rates(&self) -> &[HitRate] {
        &self.metadata.hit_rates
    }

    fn encode(&self, sequences: &[&[u32]]) -> Result<Vec<HashTable>, PredictorError> {
        self.look_up(Stack::Encoder, sequences)
    }

    fn decode(&self, states: &mut [&mut PredictorState], tokens: &[&[u32]]) -> Result<Vec<HashTable>, PredictorError> {
        if states.len() != tokens.len() {
            return Err(PredictorError::States { states: states.len(), sequences: tokens.len() });
        }
        if let Some(state) = states.iter().find(|state| !state.values.is_empty()) {
            return Err(PredictorError::State {
                reason: format!("holds {} values, expected none", state.values.len()),
            });
        }
        self.look_up(Stack::Decoder, tokens)
    }
}
