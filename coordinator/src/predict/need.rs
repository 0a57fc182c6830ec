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
    measuring: Mutex<Measuring>,
}

impl Need {
    pub(crate) fn new(nodes: Arc<Nodes>, is_evaluated: bool, predict: &Predict) -> Self {
        // Without a predictor there is nothing to measure, and a prediction that nobody needs is not missing.
        let share = if predict.is_off() { 0.0 } else { MEASURING_SHARE };
        Self { nodes, is_evaluated, measuring: Mutex::new(Measuring::new(share)) }
    }

    /// Whether each request of a batch is predicted, given its mode.
    pub(crate) fn of_batch(&self, modes: impl Iterator<Item = RoutingMode>) -> Vec<bool> {
        let gains_by_plans = self.is_evaluated || self.nodes.roster().gains_by_plans();
        let routed_by_it = modes.map(|mode| mode != RoutingMode::Exact);
        self.measuring.lock().of_batch(routed_by_it, gains_by_plans, self.nodes.clock().now())
    }

    /// The prediction of requests in these modes took so long.
    pub(crate) fn took(&self, mut modes: impl Iterator<Item = RoutingMode>, took: Duration) {
        if modes.all(|mode| mode == RoutingMode::Exact) && !self.nodes.roster().gains_by_plans() {
            self.measuring.lock().spent(took);
        }
    }
}
