//! The queue between the network and the threads that compute expert calls. tokio's threads carry bytes and must not
//! compute, so each call crosses to a thread once, and its answer goes straight back to its lane. Lanes and the health
//! check fill the queue; threads that [`start`] makes empty it.
//!
//! The queue itself has no bound: every call in it holds permits of its lane and of the node (see
//! [`crate::lane`]), and those are bounded.

use std::{
    io,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::Arc,
    thread,
    time::Instant,
};

use crossbeam_channel::{Receiver, Sender, unbounded};
use sida_cluster::experts::{CallError, CallReport, ExpertCall, LocalExperts};
use sida_model::ExpertWindow;
use sida_proto::{
    v1,
    wire::{Bounds, Call, CallRows},
};
use sida_routing::{Group, PlacedGroup};
use sida_rpc::{Fault, Reason};
use sida_telemetry::{Span, TraceContext, spans};

use crate::engine::Engine;

/// What a thread does next.
pub(crate) enum Job {
    /// A call of a lane, as it came.
    Call {
        /// The message, not checked yet: checking copies the payload, which is work for a computing thread.
        activations: v1::Activations,
        /// The window of the lane, if that has one.
        window: Option<Arc<dyn ExpertWindow>>,
        /// When the call was read from its lane.
        received: Instant,
        /// Takes the answer. Called once.
        answer: Box<dyn FnOnce(v1::Results) + Send>,
    },
    /// A health check: prove that the node works.
    Probe {
        /// Takes what was found.
        answer: Box<dyn FnOnce(Result<(), String>) + Send>,
    },
}

/// Starts `threads` threads that take jobs until every sender is gone.
pub(crate) fn start(engine: &Arc<Engine>, bounds: Bounds, threads: usize) -> io::Result<Sender<Job>> {
    let (sender, receiver) = unbounded();
    for number in 0..threads {
        let (engine, receiver) = (engine.clone(), receiver.clone());
        let name = format!("expert-call-{number}");
        thread::Builder::new().name(name).spawn(move || take_jobs(&engine, &bounds, &receiver))?;
    }
    Ok(sender)
}

fn take_jobs(engine: &Engine, bounds: &Bounds, jobs: &Receiver<Job>) {
    for job in jobs {
        match job {
            Job::Call { activations, window, received, answer } => {
                answer(results(engine, bounds, activations, window.as_deref(), received));
            }
            Job::Probe { answer } => {
                answer(guarded(|| engine.probe().map_err(fault)).map_err(|fault| fault.to_string()))
            }
        }
    }
}

/// The answer to one call: its results, or why there are none.
fn results(
    engine: &Engine,
    bounds: &Bounds,
    activations: v1::Activations,
    window: Option<&dyn ExpertWindow>,
    received: Instant,
) -> v1::Results {
    let call_id = activations.call_id;
    let trace = TraceContext::from_traceparent(&activations.traceparent);
    let mut span = trace.map(|trace| Span::of_caller(Some(trace), || "compute".into()).as_server().since(received));
    let taken = Instant::now();
    if let Some(span) = span.as_mut().filter(|span| span.is_recorded()) {
        span.set("sida.node", engine.node().to_string());
        span.set("sida.layer", i64::from(activations.layer));
        span.set("sida.experts", activations.experts.len() as i64);
        spans::record(span.context(), "call queue", received, taken);
    }
    match guarded(|| computed(engine, bounds, activations, window)) {
        Ok((rows, report)) => {
            if let Some(span) = &mut span {
                span.set("sida.demand_loads", i64::from(report.demand_loads));
                span.set("sida.load_us", spans::microseconds(report.load));
                span.set("sida.compute_us", spans::microseconds(report.compute));
            }
            v1::Results::done(call_id, rows, report_message(report, engine.gains_by_plans()))
        }
        Err(fault) => {
            if let Some(span) = &mut span {
                span.fail(&fault);
            }
            let is_ours = [Reason::Internal, Reason::ExpertLoadFailed, Reason::DeviceFailed].contains(&fault.reason());
            if is_ours && let Some(lines_left_out) = engine.failures.next(Instant::now()) {
                let trace_id = trace.map(|trace| tracing::field::display(trace.trace_id()));
                tracing::error!(node = %engine.node(), call_id, trace_id, %fault, lines_left_out, "call failed");
            }
            let (code, reason, message) = (fault.reason().code(), fault.reason().name(), fault.message());
            let (reason, message, newer_placement) = (reason.into(), message.into(), Default::default());
            let error = v1::CallError { code: code.into(), reason, message, newer_placement };
            v1::Results::failed(call_id, error)
        }
    }
}

/// The results and what they cost. The results are empty where they are written to the window.
fn computed(
    engine: &Engine,
    bounds: &Bounds,
    activations: v1::Activations,
    window: Option<&dyn ExpertWindow>,
) -> Result<(Vec<f32>, CallReport), Fault> {
    let call: Call = activations.check(bounds).map_err(|error| Fault::from_error(Reason::MalformedMessage, &error))?;
    match (call.rows, window) {
        (CallRows::Sent(activations), _) => {
            let mut out = vec![0.0; activations.len()];
            let call = ExpertCall { layer: call.layer, groups: &call.groups, activations: &activations };
            let report = engine.compute(call, &mut out).map_err(fault)?;
            Ok((out, report))
        }
        (CallRows::InWindow(firsts), Some(window)) => {
            let placed = |(group, first): (&Group, u32)| PlacedGroup { expert: group.expert, first, rows: group.rows };
            let groups: Vec<PlacedGroup> = call.groups.iter().zip(firsts).map(placed).collect();
            let report = engine.compute_in_window(window, call.layer, &groups).map_err(fault)?;
            Ok((Vec::new(), report))
        }
        (CallRows::InWindow(_), None) => {
            Err(Fault::new(Reason::MalformedMessage, "rows are said to be in a window, and the lane has none"))
        }
    }
}

/// Turns a panic, which is a broken invariant of ours, into a failure of this job alone.
fn guarded<T>(work: impl FnOnce() -> Result<T, Fault>) -> Result<T, Fault> {
    // What a call holds of the engine gives itself back while it unwinds, so the engine stays sound.
    catch_unwind(AssertUnwindSafe(work))
        .unwrap_or_else(|_| Err(Fault::new(Reason::Internal, "the call panicked; see the node's log")))
}

fn fault(error: CallError) -> Fault {
    let reason = match error {
        CallError::Malformed(_) => Reason::MalformedMessage,
        CallError::Load { .. } => Reason::ExpertLoadFailed,
        CallError::Device { .. } => Reason::DeviceFailed,
        CallError::ShuttingDown => Reason::ShuttingDown,
    };
    Fault::from_error(reason, &error)
}

fn report_message(report: CallReport, gains_by_plans: bool) -> v1::CallReport {
    v1::CallReport {
        hits: report.hits,
        demand_loads: report.demand_loads,
        load_us: report.load.as_micros() as u64,
        compute_us: report.compute.as_micros() as u64,
        gains_nothing_by_plans: !gains_by_plans,
    }
}
