//! Fills hash tables: by a predictor in this process, by predictor-nodes, or not at all. Called by `prepare` for the
//! encoder and by the scheduler for each decode step.
//!
//! A prediction that cannot be had is never an error: the request runs `exact` without hints and says so in
//! its trace.

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    sync::Arc,
};

use bytes::Bytes;
use sida_model::{ModelConfig, Stack};
use sida_predictor::{HashPredictor, PredictorState};
use sida_routing::{Digest, HashTable, LayerId};
use sida_telemetry::TraceContext;

use crate::predict::remote_predictor::RemotePredictor;

/// The source of hash tables.
pub(crate) struct Predict {
    source: Source,
    model: Digest,
    encoder_layers: std::ops::Range<u16>,
    decoder_layers: std::ops::Range<u16>,
}

/// Where predictions are made.
pub(crate) enum Source {
    /// In this process.
    Local(Arc<dyn HashPredictor>),
    /// On predictor-nodes.
    Remote(Box<RemotePredictor>),
    /// Nowhere: every request runs unpredicted.
    Off,
}

/// What a predictor knows of one decoding sequence.
pub(crate) struct Progress {
    state: ProgressState,
    /// Tokens the state has not seen, because the prediction for them failed.
    unseen: Vec<u32>,
}

/// The predictor's state of a sequence: as the predictor in this process keeps it, or as predictor-nodes encode it.
enum ProgressState {
    Local(PredictorState),
    Remote(Bytes),
}

impl Predict {
    pub(crate) fn new(source: Source, config: &ModelConfig, model: Digest) -> Self {
        let (encoder_layers, decoder_layers) = (config.moe_layers(Stack::Encoder), config.moe_layers(Stack::Decoder));
        Self { source, model, encoder_layers, decoder_layers }
    }

    /// The digest of the predictor, where that is in this process.
    pub(crate) fn digest(&self) -> Option<Digest> {
        match &self.source {
            Source::Local(predictor) => Some(predictor.digest()),
            Source::Remote(_) | Source::Off => None,
        }
    }

    /// A table of the encoder's layers for each sequence, or none for any.
    pub(crate) fn encode(&self, sequences: &[&[u32]], trace: Option<TraceContext>) -> Vec<Option<HashTable>> {
        let lengths: Vec<usize> = sequences.iter().map(|tokens| tokens.len()).collect();
        let tables = match &self.source {
            _ if self.encoder_layers.is_empty() => None,
            Source::Local(predictor) => guarded(|| predictor.encode(sequences).map_err(|e| e.to_string())),
            Source::Remote(nodes) => nodes.encode(sequences, self.encoder_layers.clone(), trace),
            Source::Off => None,
        };
        self.usable(tables, &self.encoder_layers, &lengths)
    }

    /// What is known of a sequence before its first token.
    pub(crate) fn start(&self) -> Progress {
        let state = match &self.source {
            Source::Remote(_) => ProgressState::Remote(Bytes::new()),
            Source::Local(_) | Source::Off => ProgressState::Local(PredictorState::default()),
        };
        Progress { state, unseen: Vec::new() }
    }

    /// A table of the decoder's layers for the new `tokens` of each sequence, or none for any. A table may begin
    /// with earlier tokens: its last ones are the new.
    pub(crate) fn decode(
        &self,
        progress: &mut [&mut Progress],
        tokens: &[&[u32]],
        trace: Option<TraceContext>,
    ) -> Vec<Option<HashTable>> {
        if matches!(self.source, Source::Off) || self.decoder_layers.is_empty() {
            return vec![None; tokens.len()];
        }
        for (progress, tokens) in progress.iter_mut().zip(tokens) {
            progress.unseen.extend_from_slice(tokens);
        }
        let fed: Vec<Vec<u32>> = progress.iter_mut().map(|progress| std::mem::take(&mut progress.unseen)).collect();
        let sequences: Vec<&[u32]> = fed.iter().map(Vec::as_slice).collect();
        let lengths: Vec<usize> = sequences.iter().map(|tokens| tokens.len()).collect();
        let tables = self.advance(progress, &sequences, trace);
        if tables.is_none() {
            for (progress, fed) in progress.iter_mut().zip(fed) {
                progress.unseen = fed;
            }
        }
        self.usable(tables, &self.decoder_layers, &lengths)
    }

    /// Predicts, and advances the states if that succeeds.
    fn advance(
        &self,
        progress: &mut [&mut Progress],
        sequences: &[&[u32]],
        trace: Option<TraceContext>,
    ) -> Option<Vec<HashTable>> {
        match &self.source {
            Source::Local(predictor) => {
                let mut states: Vec<&mut PredictorState> = Vec::with_capacity(progress.len());
                for progress in progress.iter_mut() {
                    match &mut progress.state {
                        ProgressState::Local(state) => states.push(state),
                        ProgressState::Remote(_) => return None,
                    }
                }
                guarded(|| predictor.decode(&mut states, sequences).map_err(|e| e.to_string()))
            }
            Source::Remote(nodes) => {
                let states = progress.iter().map(|progress| match &progress.state {
                    ProgressState::Remote(state) => state.clone(),
                    ProgressState::Local(_) => Bytes::new(),
                });
                let states: Vec<Bytes> = states.collect();
                let (tables, states) = nodes.decode(sequences, &states, self.decoder_layers.clone(), trace)?;
                for (progress, state) in progress.iter_mut().zip(states) {
                    progress.state = ProgressState::Remote(state);
                }
                Some(tables)
            }
            Source::Off => None,
        }
    }

    /// The tables, without those of another model, of other layers or of another number of tokens.
    fn usable(
        &self,
        tables: Option<Vec<HashTable>>,
        layers: &std::ops::Range<u16>,
        lengths: &[usize],
    ) -> Vec<Option<HashTable>> {
        let Some(tables) = tables.filter(|tables| tables.len() == lengths.len()) else {
            return vec![None; lengths.len()];
        };
        let fits = |table: &HashTable, tokens: usize| {
            let shape = table.shape();
            table.model == self.model
                && shape.first_layer == LayerId(layers.start)
                && shape.layers == layers.len()
                && shape.tokens == tokens
        };
        tables.into_iter().zip(lengths).map(|(table, &tokens)| fits(&table, tokens).then_some(table)).collect()
    }
}

/// A prediction in this process; its errors and panics are logged and cost the tables only.
fn guarded<T>(predict: impl FnOnce() -> Result<T, String>) -> Option<T> {
    match catch_unwind(AssertUnwindSafe(predict)) {
        Ok(Ok(tables)) => Some(tables),
        Ok(Err(error)) => {
            tracing::warn!(error, "the predictor failed; its requests run without hints");
            None
        }
        Err(_) => {
            tracing::error!("the predictor panicked; its requests run without hints");
            None
        }
    }
}
