//! Fills hash tables: by a predictor in this process, by predictor-nodes, or not at all. Called by `prepare` for the
//! encoder and by `beside` for each decode step.
//!
//! Steps of a net that reads the model's input are predicted in this process, also where predictor-nodes serve the
//! encoder: what the net keeps of each input would have to travel with every step, which costs more than the step's
//! prediction ([0026](../../../docs/decisions/0026-nets-that-see-the-whole-input.md)).
//!
//! A prediction that cannot be had is never an error: the request runs `exact` without hints and says so in
//! its trace.

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    sync::Arc,
};

use bytes::Bytes;
use parking_lot::Mutex;
use sida_model::{ModelConfig, Stack};
use sida_predictor::{HashPredictor, PredictorState};
use sida_proto::wire;
use sida_routing::{Digest, HashTable, LayerId};
use sida_telemetry::TraceContext;

use crate::{
    answer::routing_mode::RoutingMode,
    intake::request::Work,
    predict::{
        noted_labels::{self, NotedLabels},
        remote_predictor::RemotePredictor,
        teacher::Teacher,
    },
};

/// The source of hash tables.
pub(crate) struct Predict {
    source: Source,
    model: Digest,
    encoder_layers: std::ops::Range<u16>,
    decoder_layers: std::ops::Range<u16>,
    /// Those of the stack that reads prompts.
    prompt_layers: std::ops::Range<u16>,
    num_experts: usize,
    /// Where predictor-nodes predict prompts, and may learn from what became of them.
    teacher: Option<Arc<Teacher>>,
}

/// Where predictions are made.
pub(crate) enum Source {
    /// In this process.
    Local(Arc<dyn HashPredictor>),
    /// On predictor-nodes; steps of the decoder by the predictor here, if there is one.
    Remote(Arc<RemotePredictor>, Option<Arc<dyn HashPredictor>>),
    /// Nowhere: every request runs unpredicted.
    Off,
}

/// What a predictor knows of one decoding sequence. Shared by the scheduler, which feeds it, and by who predicts.
pub(crate) struct Progress {
    /// How its request is routed, on which it depends how much of what is predicted is hinted.
    pub(crate) mode: RoutingMode,
    state: Mutex<ProgressState>,
    unseen: Mutex<Unseen>,
}

/// Tokens that the state of a sequence has not seen.
#[derive(Clone, Default)]
struct Unseen {
    /// Those of the next step, and others before them: of steps whose prediction failed, and of a beginning that no step
    /// computes.
    tokens: Vec<u32>,
    /// How many the next step computes.
    rows: usize,
}

/// A sequence that goes on from what another one has computed has so many tokens before it shown to the predictor. What is
/// next depends on those just before most of all, and to show it all of a long beginning may take longer than the step.
const FOLLOWED_TOKENS_MAX: usize = 128;

impl Progress {
    /// The sequence goes on by these tokens.
    pub(crate) fn feed(&self, tokens: &[u32]) {
        let mut unseen = self.unseen.lock();
        unseen.tokens.extend_from_slice(tokens);
        unseen.rows = tokens.len();
    }

    /// The sequence begins behind these tokens, which no step computes.
    pub(crate) fn follow(&self, tokens: &[u32]) {
        let last = &tokens[tokens.len().saturating_sub(FOLLOWED_TOKENS_MAX)..];
        self.unseen.lock().tokens.extend_from_slice(last);
    }

    /// Another sequence that goes on from here. Waits for a prediction that is under way.
    pub(crate) fn fork(&self) -> Self {
        let state = match &*self.state.lock() {
            ProgressState::Local(state) => ProgressState::Local(state.clone()),
            ProgressState::Remote(state) => ProgressState::Remote(state.clone()),
        };
        Self { mode: self.mode, state: Mutex::new(state), unseen: Mutex::new(self.unseen.lock().clone()) }
    }
}

/// The predictor's state of a sequence: as the predictor in this process keeps it, or as predictor-nodes encode it.
enum ProgressState {
    Local(PredictorState),
    Remote(Bytes),
}

impl Predict {
    pub(crate) fn new(source: Source, config: &ModelConfig, model: Digest) -> Self {
        let (encoder_layers, decoder_layers) = (config.moe_layers(Stack::Encoder), config.moe_layers(Stack::Decoder));
        let (prompt_stack, prompt_layers) = match config.has_encoder() {
            true => (wire::Stack::Encoder, encoder_layers.clone()),
            false => (wire::Stack::Decoder, decoder_layers.clone()),
        };
        let teacher = match &source {
            Source::Remote(nodes, _) if !prompt_layers.is_empty() => {
                let token_bytes = noted_labels::token_bytes(prompt_layers.len(), config.num_experts);
                Some(Teacher::start(nodes.clone(), prompt_stack, token_bytes))
            }
            _ => None,
        };
        Self { source, model, encoder_layers, decoder_layers, prompt_layers, num_experts: config.num_experts, teacher }
    }

    /// Where to note what the routers choose for a prompt, if a predictor-node is to be told. In the other modes what is not the
    /// router's choice changes what later layers see.
    pub(crate) fn notes(&self, mode: RoutingMode, tokens: usize) -> Option<NotedLabels> {
        let wants = mode == RoutingMode::Exact && self.teacher.as_ref()?.wants(tokens);
        wants.then(|| NotedLabels::new(self.prompt_layers.clone(), self.num_experts))
    }

    /// Has predictor-nodes that learn told what was noted for a prompt.
    pub(crate) fn teach(&self, tokens: &[u32], noted: NotedLabels) {
        if let (Some(teacher), Some(labels)) = (&self.teacher, noted.of(tokens)) {
            teacher.push(labels);
        }
    }

    /// The digest of the predictor, where that is in this process.
    pub(crate) fn digest(&self) -> Option<Digest> {
        match &self.source {
            Source::Local(predictor) => Some(predictor.digest()),
            Source::Remote(..) | Source::Off => None,
        }
    }

    /// The predictor in this process that predicts the steps of the decoder.
    fn of_steps(&self) -> Option<&dyn HashPredictor> {
        match &self.source {
            Source::Local(predictor) | Source::Remote(_, Some(predictor)) => Some(&**predictor),
            Source::Remote(_, None) | Source::Off => None,
        }
    }

    /// Whether sequences begin by what the encoder made of their inputs.
    pub(crate) fn reads_input(&self) -> bool {
        self.of_steps().is_some_and(HashPredictor::reads_input)
    }

    /// Whether the pass that computes a request's prompt is predicted before it. Where there is no encoder, the decoder reads
    /// prompts in steps, which are predicted one by one, but for those whose states are asked for.
    pub(crate) fn predicts_prompt(&self, work: &Work) -> bool {
        !self.encoder_layers.is_empty() || matches!(work, Work::Encode { .. })
    }

    /// A table for each prompt of the layers that its pass goes through (the encoder's, or the decoder's where there is none),
    /// or none for any.
    pub(crate) fn encode(&self, sequences: &[&[u32]], trace: Option<TraceContext>) -> Vec<Option<HashTable>> {
        if self.encoder_layers.is_empty() {
            let begin = |tokens: &&[u32]| {
                let progress = self.start(RoutingMode::Exact, None);
                progress.feed(tokens);
                Arc::new(progress)
            };
            return self.decode(&sequences.iter().map(begin).collect::<Vec<_>>(), trace);
        }
        let lengths: Vec<usize> = sequences.iter().map(|tokens| tokens.len()).collect();
        let tables = match &self.source {
            Source::Local(predictor) => guarded(|| predictor.encode(sequences).map_err(|e| e.to_string())),
            Source::Remote(nodes, _) => nodes.encode(sequences, self.encoder_layers.clone(), trace),
            Source::Off => None,
        };
        self.usable(tables, &self.encoder_layers, &lengths)
    }

    /// What is known, before its first token, of a sequence whose request is in `mode` and of whose input the encoder made
    /// `states` (tokens, d_model); they matter only where [`Predict::reads_input`].
    pub(crate) fn start(&self, mode: RoutingMode, states: Option<&[f32]>) -> Progress {
        let begun = |predictor: &dyn HashPredictor| {
            let states = states.filter(|_| predictor.reads_input())?;
            guarded(|| predictor.start(states).map_err(|e| e.to_string()))
        };
        let state = match (self.of_steps(), &self.source) {
            (None, Source::Remote(..)) => ProgressState::Remote(Bytes::new()),
            // Without its input, a sequence of a net that reads it runs without hints.
            (predictor, _) => ProgressState::Local(predictor.and_then(begun).unwrap_or_default()),
        };
        Progress { mode, state: Mutex::new(state), unseen: Mutex::default() }
    }

    /// A table of the decoder's layers for the tokens that were fed last to each sequence, or none for any.
    pub(crate) fn decode(&self, sequences: &[Arc<Progress>], trace: Option<TraceContext>) -> Vec<Option<HashTable>> {
        if self.is_off() || self.decoder_layers.is_empty() {
            return vec![None; sequences.len()];
        }
        let fed: Vec<Unseen> = sequences.iter().map(|progress| std::mem::take(&mut *progress.unseen.lock())).collect();
        let tokens: Vec<&[u32]> = fed.iter().map(|unseen| &unseen.tokens[..]).collect();
        let lengths: Vec<usize> = tokens.iter().map(|tokens| tokens.len()).collect();
        let tables = self.advance(sequences, &tokens, trace);
        if tables.is_none() {
            for (progress, fed) in sequences.iter().zip(&fed) {
                progress.unseen.lock().tokens.splice(..0, fed.tokens.iter().copied());
            }
        }
        // Nothing is loaded for tokens that no step computes, nor is it judged how they were predicted.
        let tables = self.usable(tables, &self.decoder_layers, &lengths).into_iter().zip(fed);
        tables.map(|(table, fed)| table.map(|table| table.last(fed.rows))).collect()
    }

    /// Whether nobody has to be asked, so that a prediction is over soon.
    pub(crate) fn is_at_hand(&self) -> bool {
        !matches!(self.source, Source::Remote(..))
    }

    /// Whether nothing is ever predicted.
    pub(crate) fn is_off(&self) -> bool {
        matches!(self.source, Source::Off)
    }

    /// Where steps are predicted by others, who may not answer.
    pub(crate) fn is_remote(&self) -> bool {
        matches!(self.source, Source::Remote(_, None))
    }

    /// Predicts, and advances the states if that succeeds.
    fn advance(
        &self,
        sequences: &[Arc<Progress>],
        tokens: &[&[u32]],
        trace: Option<TraceContext>,
    ) -> Option<Vec<HashTable>> {
        let mut states: Vec<_> = sequences.iter().map(|progress| progress.state.lock()).collect();
        match &self.source {
            Source::Local(predictor) | Source::Remote(_, Some(predictor)) => {
                let local = states.iter_mut().map(|state| match &mut **state {
                    ProgressState::Local(state) => Some(state),
                    ProgressState::Remote(_) => None,
                });
                let mut local: Vec<&mut PredictorState> = local.collect::<Option<_>>()?;
                guarded(|| predictor.decode(&mut local, tokens).map_err(|e| e.to_string()))
            }
            Source::Remote(nodes, None) => {
                let before = states.iter().map(|state| match &**state {
                    ProgressState::Remote(state) => state.clone(),
                    ProgressState::Local(_) => Bytes::new(),
                });
                let before: Vec<Bytes> = before.collect();
                let (tables, after) = nodes.decode(tokens, &before, self.decoder_layers.clone(), trace)?;
                for (state, after) in states.iter_mut().zip(after) {
                    **state = ProgressState::Remote(after);
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
