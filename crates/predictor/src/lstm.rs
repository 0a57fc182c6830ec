//! SiDA's hash function (section 3): token embedding -> linear and ReLU -> two LSTM layers -> sparsemax
//! self-attention -> residual -> one linear head per MoE layer.
//!
//! The encoder's input is known ahead, so its LSTM runs both ways and its attention sees the whole sequence.
//! The decoder's runs forward and attends to the last [`ATTENTION_WINDOW`] tokens, so its state is bounded.
//! The paper's attention has no scale; with one (width^-0.5) scores stay of a size that sparsemax spreads over
//! several tokens. The embedding with its linear layer and ReLU depends on the token alone: the file holds its
//! result for each token, which may be narrower than the net.
//!
//! A decoder behind an encoder attends to the encoder's output, too, which the paper's does not
//! (docs/decisions/0026).
//!
//! In reading order: `activation`, `sparsemax`, `recurrence` (LSTM layers over sequences of different
//! lengths without padding), `input_attention`, `stack_net` (the whole net of one stack).

pub(crate) mod activation;
pub(crate) mod input_attention;
pub(crate) mod recurrence;
pub(crate) mod sparsemax;
pub(crate) mod stack_net;

use rayon::prelude::*;
use sida_model::Stack;
use sida_routing::{Digest, HashTable};

use crate::{
    HashPredictor, PredictorError, PredictorShape, PredictorState,
    entries::Entries,
    file::{HitRate, Metadata, Net, PredictorFile},
};

use self::stack_net::StackNet;
use crate::transformer::TransformerNet;

/// How many outputs the decoder's attention sees, the newest among them.
pub const ATTENTION_WINDOW: usize = 32;

/// Batches below this are predicted on the calling thread: waking another costs more than it saves.
const PARALLEL_TOKENS_MIN: usize = 96;

/// The nets of both stacks, the decoder's an LSTM; a stack without MoE layers has none.
pub struct LstmPredictor {
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

impl LstmPredictor {
    /// Takes the nets out of a file; checks the shape of every tensor and every value.
    pub fn from_file(mut file: PredictorFile) -> Result<Self, PredictorError> {
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
            calibration: self.metadata.calibration_of(&self.shape, stack),
        };
        entries.tables_from_logits(sequences.iter().map(|tokens| tokens.len()), logits)
    }
}

impl HashPredictor for LstmPredictor {
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
