//! Predictions for the steps of the decoder, beside the steps: while one thread computes a step, another predicts which
//! experts it will use and hints them to expert-nodes, which load what the later layers need. A step in `exact` asks for
//! its prediction only when it is over, to see how it fared, and does not wait long; one in `guided` or `hash` waits for it
//! before it begins. Called by the scheduler.
//!
//! What is waited for anyhow, or predicted sooner than a thread is woken, is predicted by the scheduler's own.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, TryRecvError, bounded};
use sida_routing::HashTable;
use sida_telemetry::{Span, TraceContext};

use crate::predict::{
    need::Need,
    predict::{Predict, Progress},
    preload::{Hint, Preload},
};

/// Below this, waking another thread and being woken by it takes longer than the prediction.
const OWN_THREAD_MAX: Duration = Duration::from_micros(100);
/// How long a step waits when it is over for a prediction from elsewhere, which may never come.
const PATIENCE: Duration = Duration::from_millis(20);

/// The scheduler's side.
pub(crate) struct PredictBeside {
    predictor: Predictor,
    jobs: Sender<Job>,
    step: Step,
    /// How long the last prediction took.
    took: Duration,
    /// How long the last step has waited for its own.
    waited: Duration,
}

/// What predicts and hints, on either thread.
#[derive(Clone)]
struct Predictor {
    need: Arc<Need>,
    predict: Arc<Predict>,
    preload: Arc<Preload>,
}

/// The other thread.
pub(crate) struct PredictThread {
    predictor: Predictor,
    jobs: Receiver<Job>,
}

/// A step that is to be predicted.
struct Job {
    sequences: Vec<Arc<Progress>>,
    trace: Option<TraceContext>,
    done: Sender<Predicted>,
}

/// A step that was predicted.
pub(crate) struct Predicted {
    /// For each of its sequences; none where the prediction failed.
    pub(crate) tables: Vec<Option<HashTable>>,
    /// Stands until it is dropped.
    _hint: Hint,
    took: Duration,
}

/// How a step waits for its prediction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Patience {
    /// Until it comes, or has failed.
    Long,
    /// For as long as it would come in if nothing is wrong.
    Short,
}

/// The prediction of the last step that has begun.
enum Step {
    Predicted(Predicted),
    /// The other thread makes it.
    UnderWay(Receiver<Predicted>),
    /// As before, for an earlier step, which is over.
    Late(Receiver<Predicted>),
    /// It was taken, or there is none.
    None,
}

/// Both sides.
pub(crate) fn beside(need: Arc<Need>, predict: Arc<Predict>, preload: Arc<Preload>) -> (PredictBeside, PredictThread) {
    let predictor = Predictor { need, predict, preload };
    let (jobs, thread_jobs) = bounded(1);
    let thread = PredictThread { predictor: predictor.clone(), jobs: thread_jobs };
    (PredictBeside { predictor, jobs, step: Step::None, took: Duration::ZERO, waited: Duration::ZERO }, thread)
}

impl PredictThread {
    /// Predicts until the scheduler has ended.
    pub(crate) fn run(self) {
        for Job { sequences, trace, done } in self.jobs {
            // The scheduler may not wait for it any more, which is no error.
            drop(done.send(self.predictor.predict(&sequences, trace)));
        }
    }
}

impl PredictBeside {
    /// Begins the prediction for a step of these sequences, if there are some. While the one for an earlier step is still under
    /// way, a step of short patience has none, and what it feeds is predicted with the next; one of long patience waits.
    pub(crate) fn begin(&mut self, sequences: Vec<Arc<Progress>>, patience: Patience, trace: Option<TraceContext>) {
        let start = Instant::now();
        let is_late = |job: Receiver<Predicted>| match patience {
            Patience::Short => matches!(job.try_recv(), Err(TryRecvError::Empty)).then_some(job),
            Patience::Long => {
                // What becomes of the earlier step's prediction is nobody's any more.
                drop(job.recv());
                None
            }
        };
        self.step = match std::mem::replace(&mut self.step, Step::None) {
            Step::UnderWay(job) | Step::Late(job) if let Some(job) = is_late(job.clone()) => Step::Late(job),
            _ if sequences.is_empty() => Step::None,
            _ if self.is_own_work(patience) => {
                let predicted = self.predictor.predict(&sequences, trace);
                self.took = predicted.took;
                Step::Predicted(predicted)
            }
            _ => {
                let (done, job) = bounded(1);
                // The other thread has nothing to do, or has ended with a panic, which costs the tables.
                match self.jobs.try_send(Job { sequences, trace, done }) {
                    Ok(()) => Step::UnderWay(job),
                    Err(_) => Step::None,
                }
            }
        };
        self.waited = start.elapsed();
    }

    /// Waits for the prediction of the step, and takes it. None if it failed, comes late, or was taken before.
    pub(crate) fn take(&mut self, patience: Patience) -> Option<Predicted> {
        let start = Instant::now();
        let predicted = match std::mem::replace(&mut self.step, Step::None) {
            Step::Predicted(predicted) => Some(predicted),
            Step::UnderWay(job) => match patience {
                // A predictor in this process has nobody to wait for.
                Patience::Short if self.predictor.predict.is_remote() => match job.recv_timeout(PATIENCE) {
                    Err(RecvTimeoutError::Timeout) => {
                        self.step = Step::Late(job);
                        None
                    }
                    predicted => predicted.ok(),
                },
                Patience::Short | Patience::Long => job.recv().ok(),
            },
            late => {
                self.step = late;
                None
            }
        };
        self.took = predicted.as_ref().map_or(self.took, |predicted| predicted.took);
        self.waited += start.elapsed();
        predicted
    }

    /// Whether the scheduler's thread predicts: nothing is computed meanwhile, or the other one would be woken in vain. One that
    /// predictor-nodes make is waited for elsewhere.
    fn is_own_work(&self, patience: Patience) -> bool {
        !self.predictor.predict.is_remote() && (patience == Patience::Long || self.took < OWN_THREAD_MAX)
    }

    /// How long the step has waited for its prediction.
    pub(crate) fn waited(&self) -> Duration {
        self.waited
    }
}

impl Predictor {
    fn predict(&self, sequences: &[Arc<Progress>], trace: Option<TraceContext>) -> Predicted {
        let start = Instant::now();
        let span = trace.map(|trace| Span::below(trace, "predict"));
        let tables = self.predict.decode(sequences, span.as_ref().map(Span::context));
        drop(span);
        let took = start.elapsed();
        let modes = sequences.iter().map(|progress| progress.mode);
        let had = || modes.clone().zip(&tables).filter_map(|(mode, table)| Some((mode, table.as_ref()?)));
        self.need.took(had().map(|(mode, _)| mode), took);
        let _span = trace.map(|trace| Span::below(trace, "preload"));
        self.preload.note_demand(tables.iter().flatten());
        let hint = self.preload.begin(had());
        Predicted { tables, _hint: hint, took }
    }
}
