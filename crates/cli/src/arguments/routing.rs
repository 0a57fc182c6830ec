//! Who chooses the experts of a token.

use clap::{Args, ValueEnum};
use sida_coordinator::RoutingMode;

/// How a request is routed.
#[derive(Args, Clone, Copy, Debug)]
pub(crate) struct RoutingArguments {
    /// Who chooses a token's expert
    #[arg(long, value_enum, default_value_t = Mode::Exact)]
    mode: Mode,
    /// In mode hash: who gives the factor of an expert's output
    #[arg(long, value_enum, default_value_t = Alpha::Router)]
    alpha: Alpha,
}

/// Routing modes that are served.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Mode {
    /// The trained router: the model's own output
    Exact,
    /// The trained router, among the predicted experts: nearly the model's own output
    Guided,
    /// The predicted expert: approximate
    Hash,
}

/// Sources of the factor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Alpha {
    /// The router's probability of the predicted expert
    Router,
    /// The predictor's
    Predicted,
}

impl From<RoutingArguments> for RoutingMode {
    fn from(arguments: RoutingArguments) -> Self {
        let alpha = match arguments.alpha {
            Alpha::Router => sida_coordinator::Alpha::Router,
            Alpha::Predicted => sida_coordinator::Alpha::Predicted,
        };
        match arguments.mode {
            Mode::Exact => Self::Exact,
            Mode::Guided => Self::Guided,
            Mode::Hash => Self::Hash { alpha },
        }
    }
}
