//! What goes through the model together: a batch, or a micro-batch. Made by the engine, cut by `forward`, walked by `walker`.

use sida_model::{SequenceState, Spans, Stack};
use sida_routing::{Grouping, LayerId, micro_batches};
use sida_telemetry::Span;

use crate::{
    dispatch::{callers::Callers, layer_rows::LayerRows},
    forward::expert_choice::SequenceRouting,
    intake::request::Request,
};

/// Rows of some sequences, all new tokens of each.
pub(crate) struct Batch<'b, 's> {
    /// What they go through.
    pub(crate) stack: Stack,
    /// A token for each row.
    pub(crate) ids: &'b [u32],
    /// Whose rows are which.
    pub(crate) spans: Spans,
    /// The decoder's, one for each span; none of prompts.
    pub(crate) states: &'b mut [&'s mut SequenceState],
    /// One for each span.
    pub(crate) routings: &'b mut [SequenceRouting],
    /// One for each span.
    pub(crate) requests: &'b [&'b Request],
}

impl<'b, 's> Batch<'b, 's> {
    /// Its rows at an MoE layer, grouped so, whose span is `span`.
    pub(crate) fn layer_rows<'r>(
        &'r self,
        layer: LayerId,
        grouping: &'r Grouping,
        span: Option<&Span>,
    ) -> LayerRows<'r> {
        let callers = Callers::new(&self.spans, self.requests);
        LayerRows { layer, grouping, callers, trace: span.map(Span::context) }
    }

    /// It as at most `count` micro-batches of about as many rows, its sequences in their order.
    pub(crate) fn cut(self, count: usize) -> Vec<Self> {
        let Self { stack, mut ids, spans, mut states, mut routings, mut requests } = self;
        let lengths: Vec<usize> = spans.ranges().map(|rows| rows.len()).collect();
        let mut first = 0;
        let micro_batch = |end: usize| {
            let own = &lengths[std::mem::replace(&mut first, end)..end];
            Self {
                stack,
                ids: ids.split_off(..own.iter().sum()).expect("an id for each row"),
                spans: Spans::new(own.iter().copied()),
                states: states.split_off_mut(..own.len().min(states.len())).expect("not more than there are"),
                routings: routings.split_off_mut(..own.len()).expect("a routing for each span"),
                requests: requests.split_off(..own.len()).expect("a request for each span"),
            }
        };
        micro_batches::cuts(&lengths, count).into_iter().map(micro_batch).collect()
    }
}
