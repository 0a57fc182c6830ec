//! The expert call of the health check: one row goes through `dispatch` as any request's rows do, to another expert
//! each time. The probe has a `Dispatch` of its own, so that it neither waits for the scheduler nor holds it up.

use std::sync::atomic::{AtomicUsize, Ordering};

use parking_lot::Mutex;
use sida_model::{ModelConfig, Spans};
use sida_routing::{ExpertId, Grouping, LayerId, Routes};

use crate::dispatch::{
    callers::Callers,
    dispatch::Dispatch,
    layer_rows::{Activations, LayerRows},
};

/// Probes one expert after another.
pub(crate) struct Probe {
    dispatch: Mutex<Dispatch>,
    moe_layers: usize,
    num_experts: usize,
    d_model: usize,
    next: AtomicUsize,
}

impl Probe {
    pub(crate) fn new(dispatch: Dispatch, config: &ModelConfig) -> Self {
        let (num_experts, d_model) = (config.num_experts, config.d_model);
        let dispatch = Mutex::new(dispatch);
        Self { dispatch, moe_layers: config.moe_layer_count(), num_experts, d_model, next: AtomicUsize::new(0) }
    }

    /// Sends a row to the next expert. The error says why no node computed it. A model without experts passes.
    pub(crate) fn run(&self) -> Result<(), String> {
        let Some(next) = self.next.fetch_add(1, Ordering::Relaxed).checked_rem(self.moe_layers * self.num_experts)
        else {
            return Ok(());
        };
        let (layer, expert) = (LayerId((next / self.num_experts) as u16), ExpertId((next % self.num_experts) as u16));
        let routes = Routes { top_k: 1, experts: vec![Some(expert)], weights: vec![1.0] };
        let x = vec![1.0; self.d_model];
        let (grouping, spans) = (Grouping::new(&routes), Spans::single_tokens(1));
        let rows = LayerRows { layer, grouping: &grouping, callers: Callers::new(&spans, &[]), trace: None };
        let dispatched = self.dispatch.lock().moe(&rows, Activations::Host(&x)).map_err(|error| error.to_string())?;
        let out = dispatched.out.unwrap_or_default();
        match dispatched.failed.into_iter().next() {
            Some((_, error)) => Err(error.to_string()),
            None if out.iter().all(|value| value.is_finite()) => Ok(()),
            None => Err(format!("layer {layer} expert {expert} answers with what is not a number")),
        }
    }
}
