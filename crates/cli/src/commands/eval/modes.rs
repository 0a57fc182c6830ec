//! The routing modes that are evaluated, in the order of the report. A mode that the coordinator does not serve is told as
//! such, so every mode that can be asked for is here.

use sida_coordinator::{Alpha, RoutingMode};

/// A routing mode, by name.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Mode {
    pub(crate) name: &'static str,
    pub(crate) routing: RoutingMode,
}

/// Invariant: the model's own answers come first, since the others are held against them.
pub(crate) const MODES: &[Mode] = &[
    Mode { name: "exact", routing: RoutingMode::Exact },
    Mode { name: "guided", routing: RoutingMode::Guided },
    Mode { name: "hash, router's alpha", routing: RoutingMode::Hash { alpha: Alpha::Router } },
    Mode { name: "hash, predicted alpha", routing: RoutingMode::Hash { alpha: Alpha::Predicted } },
];
