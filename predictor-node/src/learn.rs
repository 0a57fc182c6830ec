//! Learns from traffic: coordinators tell what their routers chose, and a thread of its own lets the predictor learn on from
//! it, tests the candidate beside the predictor that serves, and puts it in its place only if it is better. When that is
//! done, from what, and what better means is decided by `sida_routing::learning`. Whatever fails is logged and counted, and
//! what serves goes on serving.
//!
//! In reading order: `traffic` (the labels that are kept), `throttle` (the share of a processor), `learnt_dir` (the files).

mod learnt_dir;
mod throttle;
mod traffic;

use std::{
    ops::ControlFlow,
    panic::{AssertUnwindSafe, catch_unwind},
    path::PathBuf,
    sync::Arc,
    thread::JoinHandle,
    time::Instant,
};

use parking_lot::{Condvar, Mutex};
use sida_predictor::{
    PredictorError, PredictorShape,
    train::{self, FurtherOptions},
};
use sida_routing::{
    Labels,
    learning::{Learning, is_better},
};
use sida_rpc::stand_back::{self, stand_back};
use sida_telemetry::{counter, gauge, names};

use crate::{PredictorNodeError, config::LearnConfig, serving::Serving};
pub(crate) use learnt_dir::LearntDir;
use throttle::Throttle;
use traffic::{Parts, Traffic};

/// A node that learns. Ends, and waits for its thread, when it is dropped.
pub(crate) struct Learner {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

/// Between those who bring labels and the thread that learns.
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

struct State {
    traffic: Traffic,
    is_over: bool,
}

/// How a training ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Outcome {
    Swapped,
    NotBetter,
    Failed,
}

impl Outcome {
    const ALL: [Self; 3] = [Self::Swapped, Self::NotBetter, Self::Failed];

    fn label(self) -> &'static str {
        match self {
            Self::Swapped => "swapped",
            Self::NotBetter => "not_better",
            Self::Failed => "failed",
        }
    }
}

/// How the last training failed, if it did. A directory that is gone fails all of them, and busy traffic begins two a second.
#[derive(Default)]
struct LastFailure(Option<String>);

impl LastFailure {
    /// Whether this one is another one.
    fn is_news(&mut self, error: &str) -> bool {
        self.0.replace(error.to_owned()).is_none_or(|last| last != error)
    }
}

/// The thread.
struct Learns {
    shared: Arc<Shared>,
    serving: Arc<Serving>,
    shape: PredictorShape,
    /// The file of the predictor that serves.
    file: PathBuf,
    dir: LearntDir,
    throttle: Throttle,
    options: FurtherOptions,
}

impl Learner {
    /// Begins to learn. Refuses a predictor that cannot, and a directory that cannot be written.
    pub(crate) fn start(
        config: LearnConfig,
        serving: Arc<Serving>,
        shape: PredictorShape,
    ) -> Result<Self, PredictorNodeError> {
        let LearnConfig { file, dir, tokens_max, cpu_share } = config;
        train::check_trainable(&file, &shape, serving.now().model_digest())?;
        let dir = LearntDir::open(dir)?;
        for outcome in Outcome::ALL {
            counter!(names::LEARN_TRAININGS_TOTAL, names::OUTCOME => outcome.label()).increment(0);
        }
        let state = State { traffic: Traffic::new(Learning { tokens_max }), is_over: false };
        let shared = Arc::new(Shared { state: Mutex::new(state), changed: Condvar::new() });
        let (throttle, options) = (Throttle::new(cpu_share), FurtherOptions::default());
        let mut learns = Learns { shared: shared.clone(), serving, shape, file, dir, throttle, options };
        let thread = std::thread::Builder::new().name("sida-learn".to_owned()).spawn(move || learns.run());
        let thread = Some(thread.map_err(PredictorNodeError::Thread)?);
        Ok(Self { shared, thread })
    }

    /// Takes labels of prompts.
    pub(crate) fn take(&self, labels: Vec<Labels>) {
        counter!(names::LEARN_TOKENS_TOTAL).increment(labels.iter().map(|labels| labels.tokens().len() as u64).sum());
        let mut state = self.shared.state.lock();
        labels.into_iter().for_each(|labels| state.traffic.push(labels));
        gauge!(names::LEARN_KEPT_TOKENS).set(state.traffic.tokens() as f64);
        drop(state);
        self.shared.changed.notify_all();
    }
}

impl Drop for Learner {
    fn drop(&mut self) {
        self.shared.state.lock().is_over = true;
        self.shared.changed.notify_all();
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the thread that learns from traffic has panicked");
        }
    }
}

impl Shared {
    /// Waits until it is time to learn. `None` once it is over.
    fn next(&self) -> Option<Parts> {
        let mut state = self.state.lock();
        loop {
            if state.is_over {
                return None;
            }
            if let Some(parts) = state.traffic.due() {
                return Some(parts);
            }
            self.changed.wait(&mut state);
        }
    }
}

impl Learns {
    fn run(&mut self) {
        stand_back(stand_back::IN_THE_BACKGROUND);
        let mut failure = LastFailure::default();
        while let Some(parts) = self.shared.next() {
            let outcome = match catch_unwind(AssertUnwindSafe(|| self.learn(&parts))) {
                Ok(Ok(outcome)) => {
                    failure = LastFailure::default();
                    outcome
                }
                Ok(Err(PredictorNodeError::Predictor(PredictorError::GivenUp))) => return,
                Ok(Err(error)) => {
                    if failure.is_news(&error.to_string()) {
                        tracing::error!(%error, "learning from traffic failed; the predictor stays as it is");
                    }
                    Outcome::Failed
                }
                Err(_) => {
                    tracing::error!("learning from traffic panicked; the predictor stays as it is");
                    Outcome::Failed
                }
            };
            counter!(names::LEARN_TRAININGS_TOTAL, names::OUTCOME => outcome.label()).increment(1);
        }
    }

    /// Learns, tests, and puts the candidate in its place if it is better.
    fn learn(&mut self, Parts { learnt, tested }: &Parts) -> Result<Outcome, PredictorNodeError> {
        let serving = self.serving.now();
        let Self { shared, shape, throttle, .. } = self;
        throttle.begin();
        let mut rest = || {
            throttle.rest(|rest| {
                let until = Instant::now() + rest;
                let mut state = shared.state.lock();
                while !state.is_over && !shared.changed.wait_until(&mut state, until).timed_out() {}
            });
            if shared.state.lock().is_over { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        };
        let (model, candidate) = (serving.model_digest(), self.dir.candidate());
        let parts = (&learnt[..], &tested[..]);
        let candidate = train::further(&self.file, (shape, model), parts, &self.options, &candidate, &mut |_| rest())?;
        let compared = train::compare(&*serving, &*candidate, shape, tested)?;
        if rest().is_break() {
            return Err(PredictorError::GivenUp.into());
        }
        let rate = |right: u64| right as f64 / compared.entries.max(1) as f64;
        let (before, after) = (rate(compared.serving), rate(compared.candidate));
        gauge!(names::LEARN_HIT_RATE, names::KIND => "serving").set(before);
        gauge!(names::LEARN_HIT_RATE, names::KIND => "candidate").set(after);
        let is_better = is_better(&compared.gains);
        let (learnt, tested) = (learnt.len(), tested.len());
        tracing::info!(learnt, tested, before, after, is_better, digest = %candidate.digest(), "learnt from traffic");
        if !is_better {
            self.dir.discard()?;
            return Ok(Outcome::NotBetter);
        }
        self.file = self.dir.publish(&self.file)?;
        self.serving.replace(candidate);
        Ok(Outcome::Swapped)
    }
}

#[cfg(test)]
mod tests;
