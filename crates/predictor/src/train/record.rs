//! Runs the model over texts and keeps what its routers did: for every token and MoE layer the most probable
//! experts with their probabilities. The encoder reads the input; the decoder is made to write the target,
//! or answers greedily where there is none.

use std::{path::Path, sync::Arc};

use half::f16;
use rayon::prelude::*;
use sida_model::{Backbone, Checkpoint, Reference, RoutedLayer, Stack, Tokenizer, reference::greedy};
use sida_routing::{Digest, ExpertId, Labels};

use super::Text;
use crate::{PredictorError, PredictorShape, entries::top_k};

/// How much is recorded of each text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RecordOptions {
    /// Longer inputs keep their first tokens and their end.
    pub input_tokens_max: usize,
    /// Longer targets keep their first tokens; an answer ends there.
    pub target_tokens_max: usize,
    /// Experts kept per token and layer: the T of truncated distillation.
    pub kept: usize,
}

impl Default for RecordOptions {
    fn default() -> Self {
        Self { input_tokens_max: 512, target_tokens_max: 32, kept: 8 }
    }
}

/// The routing of some texts.
pub struct Recording {
    /// The model it is of.
    pub model: Digest,
    /// The model's shape.
    pub shape: PredictorShape,
    /// Routing of the inputs.
    pub encoder: StackRecording,
    /// Routing of the targets or answers.
    pub decoder: StackRecording,
}

/// The routing of one stack.
pub struct StackRecording {
    /// (vocabulary, d_model): what the stack's tokens are to the model.
    pub(super) embedding: Vec<f32>,
    pub(super) d_model: usize,
    /// Experts kept per token and layer.
    pub(super) kept: usize,
    /// What the stack read, one sequence after another.
    pub(super) sequences: Vec<Vec<u32>>,
    /// For each sequence (tokens, layers, kept), the most probable first.
    pub(super) experts: Vec<Vec<ExpertId>>,
    /// Parallel to `experts`.
    pub(super) probabilities: Vec<Vec<f32>>,
    /// Of a decoder behind an encoder: what the encoder made of the input of each sequence, (tokens, d_model).
    pub(super) inputs: Vec<Vec<f16>>,
}

impl StackRecording {
    /// Tokens of all sequences.
    pub fn tokens(&self) -> usize {
        self.sequences.iter().map(Vec::len).sum()
    }

    fn new(embedding: Vec<f32>, d_model: usize, kept: usize) -> Self {
        let (sequences, experts, probabilities, inputs) = Default::default();
        Self { embedding, d_model, kept, sequences, experts, probabilities, inputs }
    }

    /// Of a stack whose routers others have run, for a net that knows its tokens already. Those that keep fewer experts than
    /// the first are left out.
    pub(super) fn of_labels(labels: &[Arc<Labels>]) -> Self {
        let kept = labels.first().map_or(1, |labels| labels.kept());
        let mut recorded = Self::new(Vec::new(), 0, kept);
        for labels in labels.iter().filter(|labels| labels.kept() == kept) {
            let (experts, probabilities) = (labels.experts().to_vec(), labels.probabilities().to_vec());
            recorded.push(Routed { tokens: labels.tokens().to_vec(), experts, probabilities, input: None });
        }
        recorded
    }

    fn push(&mut self, routed: Routed) {
        self.sequences.push(routed.tokens);
        self.experts.push(routed.experts);
        self.probabilities.push(routed.probabilities);
        self.inputs.extend(routed.input);
    }
}

/// One sequence of one stack.
struct Routed {
    tokens: Vec<u32>,
    experts: Vec<ExpertId>,
    probabilities: Vec<f32>,
    input: Option<Vec<f16>>,
}

impl Recording {
    /// Of one stack.
    pub fn of_stack(&self, stack: Stack) -> &StackRecording {
        match stack {
            Stack::Encoder => &self.encoder,
            Stack::Decoder => &self.decoder,
        }
    }

    /// Records the model in `dir` over texts, on all threads of the rayon pool. Reports (texts done, texts).
    pub fn of(
        dir: &Path,
        texts: &[Text],
        options: &RecordOptions,
        on_progress: &mut dyn FnMut(u64, u64),
    ) -> Result<Self, PredictorError> {
        /// Texts between two reports of progress.
        const REPORT_TEXTS: usize = 64;
        let checkpoint = Checkpoint::open(dir)?;
        let shape = PredictorShape::of(checkpoint.config());
        let tokenizer = Tokenizer::open(dir, checkpoint.config())?;
        let (kept, d_model) = (options.kept.clamp(1, shape.num_experts), checkpoint.config().d_model);
        let [encoder, decoder] = embeddings(&checkpoint, &shape)?;
        let mut recording = Self {
            model: checkpoint.digest(),
            shape,
            encoder: StackRecording::new(encoder, d_model, kept),
            decoder: StackRecording::new(decoder, d_model, kept),
        };
        let recorder = Recorder { model: Reference::open(dir)?, tokenizer, options, kept };
        for (n, chunk) in texts.chunks(REPORT_TEXTS).enumerate() {
            let routed: Vec<(Routed, Routed)> =
                chunk.par_iter().map(|text| recorder.record(text)).collect::<Result<_, _>>()?;
            for (encoder, decoder) in routed {
                recording.encoder.push(encoder);
                recording.decoder.push(decoder);
            }
            on_progress((n * REPORT_TEXTS + chunk.len()) as u64, texts.len() as u64);
        }
        Ok(recording)
    }
}

/// What each stack's tokens are to the model.
fn embeddings(checkpoint: &Checkpoint, shape: &PredictorShape) -> Result<[Vec<f32>; 2], PredictorError> {
    let backbone = Backbone::load(checkpoint, &mut |_, _| ())?;
    let ids: Vec<u32> = (0..shape.vocab_size as u32).collect();
    let encoder = match checkpoint.config().has_encoder() {
        true => backbone.embed(Stack::Encoder, &ids)?,
        false => Vec::new(),
    };
    Ok([encoder, backbone.embed(Stack::Decoder, &ids)?])
}

struct Recorder<'a> {
    model: Reference,
    tokenizer: Tokenizer,
    options: &'a RecordOptions,
    kept: usize,
}

impl Recorder<'_> {
    fn record(&self, text: &Text) -> Result<(Routed, Routed), PredictorError> {
        let mut input = self.tokenizer.encode(&text.input)?;
        let longest = self.options.input_tokens_max.max(2);
        if !self.model.config().has_encoder() {
            input.truncate(longest);
            return self.read_on(input, text.target.as_deref());
        }
        if input.len() > longest {
            input.drain(longest - 1..input.len() - 1);
        }
        let (states, routing) = self.model.encode(&input)?;
        let encoder = self.keep(input, &[routing]);
        let mut decoder = match &text.target {
            Some(target) => self.force(&states, target)?,
            None => self.answer(&states)?,
        };
        decoder.input = Some(states.iter().map(|&state| f16::from_f32(state)).collect());
        Ok((encoder, decoder))
    }

    /// A decoder without an encoder reads the input, and then the target or what it writes; the last token is only written.
    fn read_on(&self, input: Vec<u32>, target: Option<&str>) -> Result<(Routed, Routed), PredictorError> {
        let longest = self.options.target_tokens_max.max(1);
        let mut tokens = input;
        match target {
            _ if tokens.is_empty() => {}
            Some(target) => tokens.extend(self.tokenizer.encode_answer(target)?.into_iter().take(longest)),
            None => tokens.extend(self.model.generate_greedy(&tokens, longest)?),
        }
        tokens.pop();
        let (_, routing) = self.model.decode_forced(&[], &tokens)?;
        let nothing = self.keep(Vec::new(), &[]);
        Ok((nothing, self.keep(tokens, &[routing])))
    }

    /// The decoder reads the start token and the target but its last token, which it only has to write.
    fn force(&self, encoder_states: &[f32], target: &str) -> Result<Routed, PredictorError> {
        let mut tokens = vec![self.model.config().generation.decoder_start_token_id];
        tokens.extend(self.tokenizer.encode(target)?);
        tokens.pop();
        tokens.truncate(self.options.target_tokens_max.max(1));
        let (_, routing) = self.model.decode_forced(encoder_states, &tokens)?;
        Ok(self.keep(tokens, &[routing]))
    }

    /// The decoder reads what it wrote.
    fn answer(&self, encoder_states: &[f32]) -> Result<Routed, PredictorError> {
        let generation = &self.model.config().generation;
        let tokens_max = self.options.target_tokens_max.max(1);
        let tokens_min = generation.tokens_min.min(tokens_max);
        let mut state = self.model.start(encoder_states)?;
        let mut next = generation.decoder_start_token_id;
        let (mut tokens, mut routing) = (Vec::new(), Vec::new());
        while tokens.len() < tokens_max && (tokens.is_empty() || !generation.is_end(next)) {
            tokens.push(next);
            let (mut logits, routed) = self.model.decode(&mut state, &[next])?;
            routing.push(routed);
            generation.token_rule(tokens.len() - 1, tokens_min, tokens_max).apply(&mut logits);
            next = greedy(&logits);
        }
        Ok(self.keep(tokens, &routing))
    }

    /// The most probable experts of each token, from one or more calls' routing.
    fn keep(&self, tokens: Vec<u32>, calls: &[Vec<RoutedLayer>]) -> Routed {
        let num_experts = self.model.config().num_experts;
        let layers = calls.first().map_or(0, Vec::len);
        let mut experts = vec![ExpertId(0); tokens.len() * layers * self.kept];
        let mut probabilities = vec![0.0; experts.len()];
        let mut entries = experts.chunks_exact_mut(self.kept).zip(probabilities.chunks_exact_mut(self.kept));
        for call in calls {
            let called = call.first().map_or(0, |layer| layer.probabilities.len() / num_experts);
            for token in 0..called {
                for (layer, (experts, probabilities)) in call.iter().zip(&mut entries) {
                    top_k(&layer.probabilities[token * num_experts..][..num_experts], experts, probabilities);
                }
            }
        }
        Routed { tokens, experts, probabilities, input: None }
    }
}
