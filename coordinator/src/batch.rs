//! What goes through the model together: a pass, or a half of it. Made by the engine, cut and walked by `forward`.

use sida_model::{SequenceState, Spans, Stack};
use sida_routing::{Grouping, LayerId, micro_batches};
use sida_telemetry::Span;

use crate::{callers::Callers, layer_rows::LayerRows, request::Request, routing_mode::Part};

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
    pub(crate) parts: &'b mut [Part],
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

    /// It as two micro-batches of about as many rows, the sequences in order; as one, if there is no second sequence.
    pub(crate) fn halves(self) -> Vec<Self> {
        let lengths: Vec<usize> = self.spans.ranges().map(|rows| rows.len()).collect();
        let Some(middle) = micro_batches::middle(&lengths) else { return vec![self] };
        let Self { stack, ids, spans, states, parts, requests } = self;
        let (first_ids, second_ids) = ids.split_at(spans.range(middle).start);
        let (first_states, second_states) = states.split_at_mut(middle.min(states.len()));
        let (first_parts, second_parts) = parts.split_at_mut(middle);
        let (first_requests, second_requests) = requests.split_at(middle);
        let half = |lengths: &[usize], ids, states, parts, requests| Self {
            stack,
            ids,
            spans: Spans::new(lengths.iter().copied()),
            states,
            parts,
            requests,
        };
        vec![
            half(&lengths[..middle], first_ids, first_states, first_parts, first_requests),
            half(&lengths[middle..], second_ids, second_states, second_parts, second_requests),
        ]
    }
}
