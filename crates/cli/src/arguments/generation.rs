//! How an answer is generated.

use clap::Args;
use sida_coordinator::{GenerateParams, Prompt, Sampling};

use super::routing::RoutingArguments;

/// Length and choice of the tokens of an answer.
#[derive(Args, Clone, Debug)]
pub(crate) struct GenerationArguments {
    /// Tokens of an answer at most; 0 as if not given [default: the model's own, else 64]
    #[arg(long, value_name = "N")]
    max_tokens: Option<usize>,
    /// No end of the answer before so many tokens. A stop text that is complete at that token or later ends it, wherever the
    /// stop text began [default: the model's own, mostly 0]
    #[arg(long, value_name = "N")]
    min_tokens: Option<usize>,
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
    /// Draw among the tokens that are at least P times as likely as the likeliest, 0 to 1; 0: among all [default: the model's
    /// own, mostly 0]
    #[arg(long, value_name = "P")]
    min_p: Option<f32>,
    /// Make tokens less likely that the answer has already, or that a decoder-only model has read: 1 changes nothing [default:
    /// the model's own, mostly 1]
    #[arg(long, value_name = "R")]
    repetition_penalty: Option<f32>,
    /// Take this off a token's score for each time that it was written, -2 to 2
    #[arg(long, value_name = "F", default_value_t = 0.0)]
    frequency_penalty: f32,
    /// Take this off a token's score if it was written at all, -2 to 2
    #[arg(long, value_name = "F", default_value_t = 0.0)]
    presence_penalty: f32,
    /// Draw the same tokens again next time
    #[arg(long, value_name = "N")]
    seed: Option<u64>,
    /// End where the answer contains this text, which is cut off; may be given several times
    #[arg(long, value_name = "TEXT")]
    stop: Vec<String>,
}

impl GenerationArguments {
    /// The request that asks for `prompt` to be answered like this.
    pub(crate) fn params(&self, prompt: impl Into<Prompt>, routing: RoutingArguments) -> GenerateParams {
        GenerateParams {
            prompt: prompt.into(),
            routing: routing.into(),
            max_tokens: self.max_tokens.unwrap_or(0),
            min_tokens: self.min_tokens,
            ignore_eos: self.ignore_eos,
            sampling: Sampling {
                temperature: self.temperature,
                top_k: self.top_k,
                top_p: self.top_p,
                min_p: self.min_p,
                repetition_penalty: self.repetition_penalty,
                frequency_penalty: self.frequency_penalty,
                presence_penalty: self.presence_penalty,
                seed: self.seed,
                ..Sampling::default()
            },
            stop: self.stop.clone(),
            ..GenerateParams::default()
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        generation: GenerationArguments,
        #[command(flatten)]
        routing: RoutingArguments,
    }

    #[test]
    fn what_is_not_asked_for_is_the_models() {
        // Broken: every answer would have 64 tokens, whatever the model's generation config says, or a least length of the
        // model's could not be switched off.
        let params = |line: &[&str]| {
            let line = Line::parse_from(line);
            line.generation.params("x".to_owned(), line.routing)
        };
        let plain = params(&["ask"]);
        assert_eq!((plain.max_tokens, plain.min_tokens), (0, None));
        let asked = params(&["ask", "--max-tokens", "9", "--min-tokens", "0"]);
        assert_eq!((asked.max_tokens, asked.min_tokens), (9, Some(0)));
        assert_eq!(plain.sampling, Sampling::default());
        let line = ["ask", "--min-p", "0.1", "--repetition-penalty", "1.2", "--frequency-penalty=-0.5"];
        let expected = Sampling {
            min_p: Some(0.1),
            repetition_penalty: Some(1.2),
            frequency_penalty: -0.5,
            presence_penalty: 2.0,
            ..Sampling::default()
        };
        assert_eq!(params(&[&line[..], &["--presence-penalty", "2"]].concat()).sampling, expected);
    }
}
