//! One MoE layer where the backbone and all experts are on one device of this process: nothing travels, not even to this
//! machine's memory. Tried by [`crate::dispatch`] before rows are sent anywhere.

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    time::Instant,
};

use sida_model::Dense;
use sida_routing::{Grouping, LayerId};

use crate::{
    dispatch::Dispatched,
    nodes::{Reach, Roster},
};

/// Has the one node there is start the layer, if it is in this process and has its experts where the rows are;
/// [`Dense::add_computed`] adds the results. `None`: the rows are to be sent, also if the node failed.
pub(crate) fn compute(roster: &Roster, layer: LayerId, grouping: &Grouping, dense: &mut Dense) -> Option<Dispatched> {
    let [link] = &roster.links[..] else { return None };
    let Reach::Local(experts) = &link.reach else { return None };
    let mut rows = dense.rows_on_device()?;
    let start = Instant::now();
    match catch_unwind(AssertUnwindSafe(|| experts.compute_beside(layer, grouping, &mut rows))) {
        Ok(None) => None,
        Ok(Some(Ok(report))) => {
            link.durations.record(start.elapsed());
            let demand_loads = u64::from(report.demand_loads);
            Some(Dispatched { load: report.load, demand_loads, ..Dispatched::default() })
        }
        Ok(Some(Err(error))) => {
            tracing::warn!(node = %link.node, %layer, %error, "experts beside the backbone failed");
            None
        }
        Err(_) => {
            tracing::error!(node = %link.node, %layer, "experts beside the backbone panicked");
            None
        }
    }
}
