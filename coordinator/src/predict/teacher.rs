//! Tells predictor-nodes that learn what the routers chose. What is to be told waits in a bounded queue, which is full rather
//! than ever waited for, and a task of its own brings it to one node after the other. Where no node learns, which is asked
//! every few seconds, nothing is noted and nothing is sent.

use std::{
    collections::VecDeque,
    sync::{
        Arc, Weak,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use metrics::Counter;
use parking_lot::Mutex;
use sida_proto::wire::Stack;
use sida_routing::Labels;
use sida_telemetry::{counter, names};

use crate::predict::remote_predictor::{Link, RemotePredictor};

/// How often what waits is sent.
const PERIOD: Duration = Duration::from_millis(500);
/// How often nodes are asked whether they learn.
const ASK_PERIOD: Duration = Duration::from_secs(2);
/// What waits, at most, in bytes of a message; with the period this bounds what is sent in a second, and what noting it costs.
const WAITING_BYTES_MAX: usize = 1 << 20;
/// Sequences that wait, at most, and tokens of each: a predictor-node takes so many in one call.
const WAITING_SEQUENCES_MAX: usize = 256;
const SEQUENCE_TOKENS_MAX: usize = 4096;

/// Between the scheduler, which brings labels, and the task that sends them.
pub(crate) struct Teacher {
    waiting: Mutex<Waiting>,
    /// Tokens that wait, at most.
    tokens_max: usize,
    /// Whether a node learns.
    is_wanted: AtomicBool,
    sent: Counter,
    dropped: Counter,
}

#[derive(Default)]
struct Waiting {
    sequences: VecDeque<Labels>,
    tokens: usize,
}

impl Teacher {
    /// Brings labels of a stack, of so many bytes for each token, to those nodes of `nodes` that learn, as long as it is kept.
    pub(crate) fn start(nodes: Arc<RemotePredictor>, stack: Stack, token_bytes: usize) -> Arc<Self> {
        let tokens = |outcome| counter!(names::LABELLED_TOKENS_TOTAL, names::OUTCOME => outcome);
        let (sent, dropped) = (tokens("sent"), tokens("dropped"));
        let (waiting, is_wanted) = Default::default();
        let tokens_max = WAITING_BYTES_MAX / token_bytes;
        let teacher = Arc::new(Self { waiting, tokens_max, is_wanted, sent, dropped });
        let runtime = nodes.runtime().clone();
        runtime.spawn(teach(Arc::downgrade(&teacher), stack, nodes));
        teacher
    }

    /// Whether labels of so many tokens would be sent.
    pub(crate) fn wants(&self, tokens: usize) -> bool {
        if !self.is_wanted.load(Ordering::Relaxed) {
            return false;
        }
        let has_room = self.has_room(&self.waiting.lock(), tokens);
        if !has_room {
            self.dropped.increment(tokens as u64);
        }
        has_room
    }

    fn has_room(&self, waiting: &Waiting, tokens: usize) -> bool {
        let is_taken = waiting.sequences.len() < WAITING_SEQUENCES_MAX && tokens <= SEQUENCE_TOKENS_MAX;
        is_taken && waiting.tokens + tokens <= self.tokens_max
    }

    /// Has labels sent, if there still is room for them: other prompts of the same pass may have taken it.
    pub(crate) fn push(&self, labels: Labels) {
        let tokens = labels.tokens().len();
        let mut waiting = self.waiting.lock();
        if !self.has_room(&waiting, tokens) {
            return self.dropped.increment(tokens as u64);
        }
        waiting.tokens += tokens;
        waiting.sequences.push_back(labels);
    }

    /// Takes all that waits.
    fn take(&self) -> Waiting {
        std::mem::take(&mut *self.waiting.lock())
    }
}

/// The task that sends.
async fn teach(teacher: Weak<Teacher>, stack: Stack, nodes: Arc<RemotePredictor>) {
    let (mut learners, mut asked) = (Vec::<Arc<Link>>::new(), None::<Instant>);
    for turn in 0usize.. {
        if asked.is_none_or(|asked| asked.elapsed() >= ASK_PERIOD) {
            learners = nodes.learners().await;
            asked = Some(Instant::now());
        }
        let Some(teacher) = teacher.upgrade() else { return };
        teacher.is_wanted.store(!learners.is_empty(), Ordering::Relaxed);
        let Waiting { sequences, tokens } = teacher.take();
        if !sequences.is_empty() {
            let at = turn % learners.len().max(1);
            let told = match learners.get(at) {
                Some(learner) => nodes.teach(learner, stack, &Vec::from(sequences)).await,
                None => Err("no predictor-node learns any more".to_owned()),
            };
            match told {
                Ok(()) => teacher.sent.increment(tokens as u64),
                Err(reason) => {
                    tracing::warn!(reason, "a predictor-node that learns could not be told what routers chose");
                    teacher.dropped.increment(tokens as u64);
                    // Until it is asked again whether it learns.
                    learners.drain(at..learners.len().min(at + 1));
                }
            }
        }
        drop(teacher);
        tokio::time::sleep(PERIOD).await;
    }
}

#[cfg(test)]
mod tests {
    use sida_routing::{ExpertId, LabelsExtent};

    use super::*;

    /// Labels that nobody takes would gather without a bound, or be noted where nobody learns.
    #[test]
    fn it_is_full_rather_than_waited_for() {
        let (waiting, is_wanted) = Default::default();
        let (sent, dropped) = (Counter::noop(), Counter::noop());
        let teacher = Teacher { waiting, tokens_max: 8000, is_wanted, sent, dropped };
        let labels = |tokens: usize| {
            let extent = LabelsExtent { layers: 1, num_experts: 1, kept: 1 };
            Labels::new(vec![0; tokens], extent, vec![ExpertId(0); tokens], vec![1.0; tokens]).unwrap()
        };
        assert!(!teacher.wants(1), "nobody learns");
        teacher.is_wanted.store(true, Ordering::Relaxed);
        for _ in 0..3 {
            teacher.push(labels(4000));
        }
        assert!(!teacher.wants(1));
        let Waiting { sequences, tokens } = teacher.take();
        assert_eq!((sequences.len(), tokens), (2, 8000));
        assert!(teacher.wants(SEQUENCE_TOKENS_MAX) && !teacher.wants(SEQUENCE_TOKENS_MAX + 1));
        for _ in 0..300 {
            teacher.push(labels(1));
        }
        assert_eq!(teacher.take().sequences.len(), WAITING_SEQUENCES_MAX);
    }
}
