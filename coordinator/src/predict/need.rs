//! Which requests are predicted: `routing::prediction` decides, and is told here whether nodes gain by plans, and what
//! predictions took that only measured. Asked by `prepare` for each batch.

use std::{sync::Arc, time::Duration};

use parking_lot::Mutex;
use sida_routing::prediction::{MEASURING_SHARE, Measuring};

use crate::{answer::routing_mode::RoutingMode, dispatch::nodes::Nodes, predict::predict::Predict};

/// Says which.
pub(crate) struct Need {
    nodes: Arc<Nodes>,
    /// Whether all of them are, as an evaluation wants it.
    is_evaluated: bool,
    /// Whether there is no predictor: then a prediction that no request is routed by is not missing.
    is_off: bool,
    measuring: Mutex<Measuring>,
}

impl Need {
    pub(crate) fn new(nodes: Arc<Nodes>, is_evaluated: bool, predict: &Predict) -> Self {
        let is_off = predict.is_off();
        let share = if is_off { 0.0 } else { MEASURING_SHARE };
        Self { nodes, is_evaluated, is_off, measuring: Mutex::new(Measuring::new(share)) }
    }

    /// Whether each request of a batch is predicted, given its mode.
    pub(crate) fn of_batch(&self, modes: impl Iterator<Item = RoutingMode>) -> Vec<bool> {
        let routed_by_it = modes.map(|mode| mode != RoutingMode::Exact);
        self.measuring.lock().of_batch(routed_by_it, self.are_all(), self.nodes.clock().now())
    }

    /// The predictions that were had, of requests in these modes, took so long together. One that failed costs nothing here: most
    /// fail at once, and one that was waited for would keep all others from being made long after predictors are back.
    pub(crate) fn took(&self, modes: impl Iterator<Item = RoutingMode>, took: Duration) {
        if !self.are_all() {
            self.measuring.lock().spent(took, modes.map(|mode| mode == RoutingMode::Exact));
        }
    }

    /// Whether all requests are predicted.
    fn are_all(&self) -> bool {
        self.is_evaluated || !self.is_off && self.nodes.roster().gains_by_plans()
    }
}
