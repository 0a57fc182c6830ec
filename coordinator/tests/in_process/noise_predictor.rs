//! A predictor that knows nothing: experts and alphas from a hash of the token, its place and a seed.

use std::{path::Path, thread, time::Duration};

use sida_model::Checkpoint;
use sida_predictor::{HashPredictor, HitRate, PredictorError, PredictorShape, PredictorState};
use sida_routing::{Digest, ExpertId, HashTable, LayerId, hash_table::Shape};

const TOP_K: usize = 3;

/// The predictor.
#[derive(Clone)]
pub(crate) struct NoisePredictor {
    shape: PredictorShape,
    model: Digest,
    seed: u64,
    /// Whether what it says of a token depends on the token's place among those that are fed with it.
    by_place: bool,
    /// How many experts it names for a token.
    top_k: usize,
    /// How long it takes over a step of the decoder.
    delay: Duration,
}

impl NoisePredictor {
    /// For the model in `dir`.
    pub(crate) fn of(dir: &Path, seed: u64) -> Self {
        let checkpoint = Checkpoint::open(dir).expect("model");
        let (shape, model) = (PredictorShape::of(checkpoint.config()), checkpoint.digest());
        Self { shape, model, seed, by_place: true, top_k: TOP_K, delay: Duration::ZERO }
    }

    /// The same, but slow.
    pub(crate) fn slow(self, delay: Duration) -> Self {
        Self { delay, ..self }
    }

    /// The same, but what it says of a token depends on the token alone.
    pub(crate) fn wherever(self) -> Self {
        Self { by_place: false, ..self }
    }

    /// The same, but it names so many experts for each token, some of them more than once.
    pub(crate) fn naming(self, top_k: usize) -> Self {
        Self { top_k, ..self }
    }

    /// The same, but what it says depends on this number, too.
    pub(crate) fn behind(self, number: u64) -> Self {
        Self { seed: self.seed ^ number.rotate_left(40), ..self }
    }

    /// The table of new tokens of the decoder.
    pub(crate) fn decoder_table(&self, tokens: &[u32]) -> HashTable {
        self.table(&self.shape.decoder_layers, tokens)
    }

    /// The encoder's tables.
    pub(crate) fn tables(&self, sequences: &[&[u32]]) -> Vec<HashTable> {
        sequences.iter().map(|tokens| self.table(&self.shape.encoder_layers, tokens)).collect()
    }

    fn table(&self, layers: &std::ops::Range<u16>, tokens: &[u32]) -> HashTable {
        let (mut experts, mut alphas) = (Vec::new(), Vec::new());
        for layer in layers.clone() {
            for (place, &token) in tokens.iter().enumerate() {
                let place = if self.by_place { place } else { 0 };
                for k in 0..self.top_k as u64 {
                    let x = self.seed ^ u64::from(token) << 32 ^ (place as u64) << 16 ^ u64::from(layer) << 8 ^ k;
                    let x = x.wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(29).wrapping_mul(0xbf58_476d_1ce4_e5b9);
                    experts.push(ExpertId((x >> 40) as u16 % self.shape.num_experts as u16));
                    alphas.push((x >> 40) as f32 / (1 << 24) as f32);
                }
            }
        }
        let (first_layer, top_k) = (LayerId(layers.start), self.top_k);
        let shape = Shape { first_layer, layers: layers.len(), tokens: tokens.len(), top_k };
        HashTable::new(self.model, self.digest(), shape, self.shape.num_experts, experts, alphas)
            .expect("a valid table")
    }
}

impl HashPredictor for NoisePredictor {
    fn net(&self) -> &str {
        "noise"
    }

    fn digest(&self) -> Digest {
        Digest([7; 32])
    }

    fn top_k(&self) -> usize {
        self.top_k
    }

    fn model_digest(&self) -> Digest {
        self.model
    }

    fn hit_rates(&self) -> &[HitRate] {
        &[]
    }

    fn encode(&self, sequences: &[&[u32]]) -> Result<Vec<HashTable>, PredictorError> {
        Ok(self.tables(sequences))
    }

    fn decode(&self, _: &mut [&mut PredictorState], tokens: &[&[u32]]) -> Result<Vec<HashTable>, PredictorError> {
        thread::sleep(self.delay);
        Ok(tokens.iter().map(|tokens| self.table(&self.shape.decoder_layers, tokens)).collect())
    }
}
