//! How an answer is generated.

use clap::Args;
use sida_coordinator::{GenerateParams, Sampling};

use super::routing::RoutingArguments;

/// Length and choice of the tokens of an answer.
#[derive(Args, Clone, Debug)]
pub(crate) struct GenerationArguments {
    /// Tokens of an answer at most
    #[arg(long, value_name = "N", default_value_t = 64)]
    max_tokens: usize,
    /// No end of the answer before so many tokens, not even at a stop text
    #[arg(long, value_name = "N", default_value_t = 0)]
    min_tokens: usize,
    /// Go on after the end of the answer, up to --max-tokens: to measure generation
    #[arg(long)]
    ignore_eos: bool,
    /// Above 0: draw each token, the more evenly the higher; 0: always the likeliest [default: the model's own, mostly 0]
    #[arg(long, value_name = "T")]
    temperature: Option<f32>,
    /// Draw among the K likeliest tokens; 0: among all [default: the model's own, mostly 0]
    #[arg(long, value_name = "K")]
    top_k: Option<usize>,
    /// Draw among the likeliest tokens that hold this much probability together; 0 or 1: among all [default: the model's
    /// own, mostly 0]
    #[arg(long, value_name = "P")]
    top_p: Option<f32>,
    /// Draw the same tokens again next time
    #[arg(long, value_name = "N")]
    seed: Option<u64>,
    /// End before this text; may be given several times
    #[arg(long, value_name = "TEXT")]
    stop: Vec<String>,
}

impl GenerationArguments {
    /// The request that asks for `text` to be answered like this.
    pub(crate) fn params(&self, text: String, routing: RoutingArguments) -> GenerateParams {
        GenerateParams {
            text,
            routing: routing.into(),
            max_tokens: self.max_tokens,
            min_tokens: self.min_tokens,
            ignore_eos: self.ignore_eos,
            sampling: Sampling { temperature: self.temperature, top_k: self.top_k, top_p: self.top_p, seed: self.seed },
            stop: self.stop.clone(),
            deadline: None,
            trace: None,
        }
    }
}
