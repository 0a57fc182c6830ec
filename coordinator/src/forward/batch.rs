//! A batch, or a micro-batch of one: the rows that go through the model together. The scheduler makes batches, and
//! `forward` may cut them.

use sida_model::{Backend, Spans, Stack, Wanted};
use sida_routing::{Grouping, LayerId, micro_batches};
use sida_telemetry::Span;

use crate::{
    dispatch::{callers::Callers, layer_rows::LayerRows},
    forward::expert_choice::SequenceRouting,
    intake::request::Request,
};

/// The new tokens of some sequences, a row each.
pub(crate) struct Batch<'b, B: Backend> {
    /// The encoder or the decoder.
    pub(crate) stack: Stack,
    /// The token of each row.
    pub(crate) ids: &'b [u32],
    /// The rows of each sequence.
    pub(crate) spans: Spans,
    /// The decoder's caches of each sequence; none where prompts are encoded.
    pub(crate) sequences: Vec<&'b mut B::Sequence>,
    /// The rows whose best next token will be asked for.
    pub(crate) wanted: &'b [Wanted],
    /// How the rows of each sequence are routed.
    pub(crate) routings: &'b mut [SequenceRouting],
    /// The request of each sequence.
    pub(crate) requests: &'b [&'b Request],
}

impl<'b, B: Backend> Batch<'b, B> {
    /// The batch's rows at an MoE layer, with their grouping by expert and the layer's trace span.
    pub(crate) fn layer_rows<'r>(
        &'r self,
        layer: LayerId,
        grouping: &'r Grouping,
        span: Option<&Span>,
    ) -> LayerRows<'r> {
        let callers = Callers::new(&self.spans, self.requests);
        LayerRows { layer, grouping, callers, trace: span.map(Span::context) }
    }

    /// Cuts the batch into at most `count` micro-batches of about equally many rows. The sequences keep their order.
    pub(crate) fn cut(self, count: usize) -> Vec<Self> {
        let Self { stack, mut ids, spans, mut sequences, mut routings, mut requests, .. } = self;
        let lengths: Vec<usize> = spans.ranges().map(|rows| rows.len()).collect();
        let mut first = 0;
        let micro_batch = |end: usize| {
            let own = &lengths[std::mem::replace(&mut first, end)..end];
            Self {
                stack,
                ids: ids.split_off(..own.iter().sum()).expect("an id for each row"),
                spans: Spans::new(own.iter().copied()),
                // Only a device computes them with the pass, and there a batch goes whole.
                wanted: &[],
                sequences: sequences.drain(..own.len().min(sequences.len())).collect(),
                routings: routings.split_off_mut(..own.len()).expect("a routing for each span"),
                requests: requests.split_off(..own.len()).expect("a request for each span"),
            }
        };
        micro_batches::cuts(&lengths, count).into_iter().map(micro_batch).collect()
    }
}
