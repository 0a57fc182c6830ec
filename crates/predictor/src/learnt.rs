//! The predictor of learnt nets, one for each stack: an LSTM or a transformer for the encoder, an LSTM for the decoder.

use rayon::prelude::*;
use sida_model::Stack;
use sida_routing::{Digest, HashTable};

use crate::{
    HashPredictor, PredictorError, PredictorShape, PredictorState,
    entries::Entries,
    file::{HitRate, Metadata, Net, PredictorFile},
    lstm::stack_net::StackNet,
    transformer::TransformerNet,
};

/// Batches below this are predicted on the calling thread: waking another costs more than it saves.
const PARALLEL_TOKENS_MIN: usize = 96;

/// The nets of both stacks, the decoder's an LSTM; a stack without MoE layers has none.
pub(crate) struct LearntPredictor {
    digest: Digest,
    metadata: Metadata,
    shape: PredictorShape,
    encoder: Option<EncoderNet>,
    decoder: Option<StackNet>,
}

/// The encoder's net, as the file says.
enum EncoderNet {
    Lstm(StackNet),
    Transformer(TransformerNet),
}

impl EncoderNet {
    fn encode(&self, sequences: &[&[u32]]) -> Vec<f32> {
        match self {
            Self::Lstm(net) => net.encode(sequences),
            Self::Transformer(net) => net.encode(sequences),
        }
    }
}

impl LearntPredictor {
    /// Takes the nets out of a file; checks the shape of every tensor and every value.
    pub(crate) fn from_file(mut file: PredictorFile) -> Result<Self, PredictorError> {
        let encoder = match file.metadata.net {
            Net::Transformer => TransformerNet::from_file(&mut file)?.map(EncoderNet::Transformer),
            Net::Lstm | Net::Table => StackNet::from_file(&mut file, Stack::Encoder)?.map(EncoderNet::Lstm),
        };
        let decoder = StackNet::from_file(&mut file, Stack::Decoder)?;
        file.finish()?;
        Ok(Self { digest: file.digest, metadata: file.metadata, shape: file.shape, encoder, decoder })
    }

    fn tables(&self, stack: Stack, sequences: &[&[u32]], logits: Vec<f32>) -> Result<Vec<HashTable>, PredictorError> {
        let entries = Entries {
            model: self.metadata.model,
            predictor: self.digest,
            layers: self.shape.layers(stack),
            num_experts: self.shape.num_experts,
            top_k: self.metadata.top_k,
            calibrations: self.metadata.calibrations_of(&self.shape, stack),
        };
        entries.tables_from_logits(sequences.iter().map(|tokens| tokens.len()), logits)
    }
}

impl HashPredictor for LearntPredictor {
    fn net(&self) -> &str {
        self.metadata.net.name()
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

    fn reads_input(&self) -> bool {
        self.decoder.as_ref().is_some_and(StackNet::reads_input)
    }

    fn start(&self, states: &[f32]) -> Result<PredictorState, PredictorError> {
        self.decoder.as_ref().map_or_else(|| Ok(PredictorState::default()), |net| net.start(states))
    }

    fn encode(&self, sequences: &[&[u32]]) -> Result<Vec<HashTable>, PredictorError> {
        self.shape.check_tokens(sequences)?;
        let tokens: usize = sequences.iter().map(|tokens| tokens.len()).sum();
        let tables = |sequences: &[&[u32]]| {
            let logits = self.encoder.as_ref().map_or_else(Vec::new, |net| net.encode(sequences));
            self.tables(Stack::Encoder, sequences, logits)
        };
        if tokens < PARALLEL_TOKENS_MIN {
            return tables(sequences);
        }
        // A sequence's prediction does not depend on its company, so a batch can be cut anywhere.
        let share = sequences.len().div_ceil(rayon::current_num_threads());
        let tables: Result<Vec<_>, _> = sequences.par_chunks(share).map(tables).collect();
        Ok(tables?.concat())
    }

    fn decode(&self, states: &mut [&mut PredictorState], tokens: &[&[u32]]) -> Result<Vec<HashTable>, PredictorError> {
        if states.len() != tokens.len() {
            return Err(PredictorError::States { states: states.len(), sequences: tokens.len() });
        }
        self.shape.check_tokens(tokens)?;
        let logits = match &self.decoder {
            Some(net) => net.decode(states, tokens)?,
            None => Vec::new(),
        };
        self.tables(Stack::Decoder, tokens, logits)
    }
}
