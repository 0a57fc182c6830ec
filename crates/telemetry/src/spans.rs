//! Spans: what was done for a request, from when to when, and below what. Recorded with times of their own rather
//! than by a thread's current span, since one step works for many requests at once and a request waits in queues
//! between threads. Used by every node; sent by [`crate::otlp`].
//!
//! A span that nobody wants (its trace is not sampled, or nothing is exported) is a context and a `None`: it costs a
//! few nanoseconds, and its context still goes on to other nodes.

use std::{
    borrow::Cow,
    time::{Duration, Instant},
};

use opentelemetry::{
    KeyValue, SpanId, TraceFlags, TraceId,
    trace::{Link, SpanContext, SpanKind, Status, TraceState},
};
use opentelemetry_sdk::trace::{SpanData, SpanEvents, SpanLinks};

use crate::{otlp, trace_context::TraceContext};

pub use opentelemetry::{Array, Value};

/// A piece of work. Ends when it is dropped.
#[derive(Debug)]
pub struct Span {
    /// Its own if it is recorded, else that of what it is below.
    context: TraceContext,
    recorded: Option<Box<Recorded>>,
}

#[derive(Debug)]
struct Recorded {
    name: Cow<'static, str>,
    kind: SpanKind,
    /// 0: none.
    parent: u64,
    parent_is_remote: bool,
    start: Instant,
    attributes: Vec<KeyValue>,
    links: Vec<Link>,
    status: Status,
}

impl Span {
    /// Begins below `parent`.
    pub fn below(parent: TraceContext, name: impl Into<Cow<'static, str>>) -> Self {
        if !parent.sampled || !otlp::is_on() {
            return Self { context: parent, recorded: None };
        }
        Self::recorded(parent.sibling(), parent.span_id, name.into())
    }

    /// Begins a trace, unless `caller` began one.
    pub fn of_caller(caller: Option<TraceContext>, name: impl FnOnce() -> Cow<'static, str>) -> Self {
        let context = caller.unwrap_or_else(|| TraceContext::root(otlp::samples_root()));
        if !context.sampled || !otlp::is_on() {
            return Self { context, recorded: None };
        }
        match caller {
            None => Self::recorded(context, 0, name()),
            Some(caller) => {
                let mut span = Self::recorded(caller.sibling(), caller.span_id, name());
                span.change(|recorded| recorded.parent_is_remote = true);
                span
            }
        }
    }

    fn recorded(context: TraceContext, parent: u64, name: Cow<'static, str>) -> Self {
        let recorded = Recorded {
            name,
            kind: SpanKind::Internal,
            parent,
            parent_is_remote: false,
            start: Instant::now(),
            attributes: Vec::new(),
            links: Vec::new(),
            status: Status::Unset,
        };
        Self { context, recorded: Some(Box::new(recorded)) }
    }

    /// What is done within it goes below this.
    pub fn context(&self) -> TraceContext {
        self.context
    }

    /// Whether it will be sent: what only serves its attributes need not be computed otherwise.
    pub fn is_recorded(&self) -> bool {
        self.recorded.is_some()
    }

    /// It began earlier, or will later.
    #[must_use]
    pub fn since(mut self, start: Instant) -> Self {
        self.change(|recorded| recorded.start = start);
        self
    }

    /// It is a call to another node, seen from here.
    #[must_use]
    pub fn as_client(mut self) -> Self {
        self.change(|recorded| recorded.kind = SpanKind::Client);
        self
    }

    /// It is another node's call, seen from here.
    #[must_use]
    pub fn as_server(mut self) -> Self {
        self.change(|recorded| recorded.kind = SpanKind::Server);
        self
    }

    /// Says something of it.
    #[must_use]
    pub fn with(mut self, key: &'static str, value: impl Into<Value>) -> Self {
        self.set(key, value);
        self
    }

    /// Says something of it once it is known.
    pub fn set(&mut self, key: &'static str, value: impl Into<Value>) {
        self.change(|recorded| recorded.attributes.push(KeyValue::new(key, value)));
    }

    /// It was also done for that.
    pub fn link(&mut self, to: TraceContext) {
        self.change(|recorded| recorded.links.push(Link::with_context(span_context(to, false))));
    }

    /// It failed.
    pub fn fail(&mut self, why: &dyn std::fmt::Display) {
        self.change(|recorded| recorded.status = Status::error(why.to_string()));
    }

    /// It ended then, which is not after now.
    pub fn end_at(mut self, end: Instant) {
        self.end(end);
    }

    fn change(&mut self, change: impl FnOnce(&mut Recorded)) {
        if let Some(recorded) = &mut self.recorded {
            change(recorded);
        }
    }

    fn end(&mut self, end: Instant) {
        let Some(recorded) = self.recorded.take() else { return };
        let Recorded { name, kind, parent, parent_is_remote, start, attributes, links, status } = *recorded;
        let mut span_links = SpanLinks::default();
        span_links.links = links;
        otlp::send(|clock| SpanData {
            span_context: span_context(self.context, false),
            parent_span_id: SpanId::from(parent),
            parent_span_is_remote: parent_is_remote,
            span_kind: kind,
            name,
            start_time: clock.at(start),
            end_time: clock.at(end.max(start)),
            attributes,
            dropped_attributes_count: 0,
            events: SpanEvents::default(),
            links: span_links,
            status,
            instrumentation_scope: otlp::scope(),
        });
    }
}

impl Drop for Span {
    fn drop(&mut self) {
        self.end(Instant::now());
    }
}

/// A span of work that is over: from `start` to `end` below `parent`.
pub fn record(parent: TraceContext, name: &'static str, start: Instant, end: Instant) {
    Span::below(parent, name).since(start).end_at(end);
}

/// `duration` as spans tell durations: whole microseconds.
pub fn microseconds(duration: Duration) -> i64 {
    i64::try_from(duration.as_micros()).unwrap_or(i64::MAX)
}

fn span_context(context: TraceContext, is_remote: bool) -> SpanContext {
    let flags = if context.sampled { TraceFlags::SAMPLED } else { TraceFlags::default() };
    let (trace, span) = (TraceId::from(context.trace_id), SpanId::from(context.span_id));
    SpanContext::new(trace, span, flags, is_remote, TraceState::default())
}
