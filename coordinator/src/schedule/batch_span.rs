//! Trace spans of work that is done for several requests at once: a prediction, a pass through the model.
//!
//! Such a span is a child of one of the requests, the first whose trace is recorded, and all spans within the work are
//! its children. Each other request gets a span of the same name and time, linked to that one, so that every trace
//! explains all of its time.

use sida_telemetry::{Span, TraceContext};

/// The span of some work for a batch. The span ends when this is dropped.
pub(crate) struct BatchSpan {
    lead: Span,
    /// The spans of the other requests whose traces are recorded.
    _others: Vec<Span>,
}

impl BatchSpan {
    /// Begins work of this name for requests with these traces. `None`: there is no request.
    pub(crate) fn begin(name: &'static str, requests: impl Iterator<Item = TraceContext>) -> Option<Self> {
        let mut requests = requests.peekable();
        let first = *requests.peek()?;
        // Where no trace is recorded the first request's goes on to other nodes, for their logs.
        let mut lead = Span::below(first, name);
        let mut others = Vec::new();
        for request in requests.skip(1) {
            let mut span = Span::below(request, name);
            if !span.is_recorded() {
                continue;
            }
            if !lead.is_recorded() {
                lead = span;
                continue;
            }
            span.link(lead.context());
            lead.link(request);
            others.push(span);
        }
        Some(Self { lead, _others: others })
    }

    /// The parent of spans of what is done within this work.
    pub(crate) fn context(&self) -> TraceContext {
        self.lead.context()
    }

    /// The span whose attributes describe the work.
    pub(crate) fn lead(&mut self) -> &mut Span {
        &mut self.lead
    }
}
