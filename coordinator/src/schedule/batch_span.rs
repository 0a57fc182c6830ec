//! Spans of work that is done for several requests at once: a prediction, a pass through the model. Made by `prepare`
//! and the engine.
//!
//! The work is below one of the requests, the first whose trace is recorded: what happens within it is told there, and
//! it is linked to the other requests. Each of those gets a span of the same name and time, linked to the first, so
//! that every trace explains all of its time.

use sida_telemetry::{Span, TraceContext};

/// A piece of work of a batch. Ends when it is dropped.
pub(crate) struct BatchSpan {
    lead: Span,
    /// Of the other requests that are recorded.
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

    /// What is done within it goes below this.
    pub(crate) fn context(&self) -> TraceContext {
        self.lead.context()
    }

    /// The span in which it is told what was done.
    pub(crate) fn lead(&mut self) -> &mut Span {
        &mut self.lead
    }
}
