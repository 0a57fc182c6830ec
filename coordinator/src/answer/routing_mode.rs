//! The routing mode of a request: who chooses the expert of its tokens. A request asks for one, the forward pass obeys it,
//! and the trace of the answer repeats it.

/// Who chooses the expert of a request's tokens, and by how much its output is scaled.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum RoutingMode {
    /// The trained router: the model's own output.
    #[default]
    Exact,
    /// The trained router, among the experts that the hash table of the request's own sequence names: nearly the model's
    /// own output, by experts that were planned. The factor is the router's probability over all experts.
    Guided,
    /// The hash table's first choices: approximate.
    Hash {
        /// Where the factors come from.
        alpha: Alpha,
    },
}

/// Where the factor of an expert's output comes from in `hash` mode.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Alpha {
    /// The router's probability of the predicted expert.
    #[default]
    Router,
    /// The predictor's, as in the paper; no router runs.
    Predicted,
}
