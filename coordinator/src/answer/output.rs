//! The output of a request, as it leaves the scheduler.

use crate::answer::trace::Trace;

/// One generated token.
#[derive(Clone, Debug)]
pub struct Token {
    /// The text it adds to the answer; may be empty within a character, or while it could be the beginning
    /// of a stop text.
    pub text: String,
    /// The token's id.
    pub id: u32,
    /// Which of the request's choices it belongs to, from 0.
    pub choice: usize,
    /// How likely it was, where the request asks for that.
    pub logprobs: Option<TokenLogprobs>,
    /// Set on the last token of its choice only.
    pub finish: Option<Finish>,
}

/// How likely a token was, by the logits as the model gave them: before penalties, bias, temperature and cut-offs.
#[derive(Clone, Debug, PartialEq)]
pub struct TokenLogprobs {
    /// ln p of the token.
    pub logprob: f32,
    /// The most likely tokens in its place, as many as the request asks for, the likeliest first. The token itself may be
    /// among them.
    pub top: Vec<TokenLogprob>,
}

/// A token that was likely.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct TokenLogprob {
    /// Its id.
    pub id: u32,
    /// ln p of it.
    pub logprob: f32,
}

/// How a generation ended, or of several choices one of them.
#[derive(Clone, Debug)]
pub struct Finish {
    /// Why the generation ended.
    pub reason: FinishReason,
    /// Tokens of the prompt, its end of sequence included.
    pub prompt_tokens: usize,
    /// Tokens of the answer, its end of sequence included.
    pub generated_tokens: usize,
    /// What happened on the way. Choices share their passes, so it is what happened to all of the request by then.
    pub trace: Trace,
}

/// Why a generation ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FinishReason {
    /// The model ended the sequence.
    End,
    /// The answer reached `tokens_max`.
    Length,
    /// The answer reached a stop text.
    Stop,
}

/// Encoder states of a text.
#[derive(Clone, Debug)]
pub struct Encoding {
    /// (rows, d_model), row-major.
    pub states: Vec<f32>,
    /// One, or one per token.
    pub rows: usize,
    /// Width of a row.
    pub d_model: usize,
    /// Tokens of the prompt, its end of sequence included.
    pub prompt_tokens: usize,
    /// Tokens of the text that were cut off, since it was longer than the limit and the request lets it be cut.
    pub truncated_tokens: usize,
    /// What happened on the way.
    pub trace: Trace,
}

/// Which rows of encoder states are the answer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Pooling {
    /// One row: the mean over tokens.
    #[default]
    Mean,
    /// One row per token.
    None,
}

/// The likelihood of each target.
#[derive(Clone, Debug)]
pub struct Scores {
    /// In the order of the targets.
    pub targets: Vec<TargetScore>,
    /// What happened on the way.
    pub trace: Trace,
}

/// The likelihood of one target.
#[derive(Clone, Debug, PartialEq)]
pub struct TargetScore {
    /// Sum over its tokens of ln p(token).
    pub log_likelihood: f32,
    /// Tokens of the target, its end of sequence included where an encoder reads.
    pub tokens: usize,
    /// How likely each of them was, where that is asked for; otherwise none.
    pub logprobs: Vec<TokenLogprobs>,
}
