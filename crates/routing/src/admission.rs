//! Who joins the running batch, in order of arrival, and who may still wait. The coordinator asks twice:
//! before it predicts (what to take from the queue) and before each decode step (what joins the sequences
//! that are running).

/// What a request adds to the batch.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Cost {
    /// Rows that pass through the model when it joins: its prompt, and its targets if it is scored.
    pub tokens: usize,
    /// Places it keeps among the running sequences afterwards. 0 for a request that is encoded and gone.
    pub sequences: usize,
}

/// Bounds of one batch and of the queue before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Rows of one pass through the model.
    pub tokens_max: usize,
    /// Sequences that run at the same time.
    pub sequences_max: usize,
    /// Requests that wait.
    pub queue_max: usize,
}

impl Limits {
    /// How many of `waiting`, in order of arrival, join a batch that already holds `running`. Nobody
    /// overtakes: a request that does not fit holds back those behind it, so that none starves. One that is
    /// larger than the limits by itself joins when nothing else is there.
    pub fn joining(&self, running: Cost, waiting: impl IntoIterator<Item = Cost>) -> usize {
        let mut held = running;
        let mut joined = 0;
        for cost in waiting {
            let tokens = held.tokens.saturating_add(cost.tokens);
            let sequences = held.sequences.saturating_add(cost.sequences);
            let fits = tokens <= self.tokens_max && (cost.sequences == 0 || sequences <= self.sequences_max);
            let alone = held == Cost::default();
            if !fits && !alone {
                break;
            }
            held = Cost { tokens, sequences };
            joined += 1;
        }
        joined
    }

    /// Whether one more request may wait behind `queued` others.
    pub fn may_wait(&self, queued: usize) -> bool {
        queued < self.queue_max
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const LIMITS: Limits = Limits { tokens_max: 100, sequences_max: 4, queue_max: 2 };

    fn cost(tokens: usize, sequences: usize) -> Cost {
        Cost { tokens, sequences }
    }

    #[test]
    fn order_of_arrival() {
        // Would break: a stream of short requests starves a long one.
        assert_eq!(LIMITS.joining(cost(0, 0), [cost(90, 1), cost(20, 1), cost(1, 1)]), 1);
    }

    #[test]
    fn oversized_request_runs_alone() {
        // Would break: a request larger than the batch limit waits for ever and blocks the queue.
        assert_eq!(LIMITS.joining(cost(0, 0), [cost(500, 9), cost(1, 0)]), 1);
        assert_eq!(LIMITS.joining(cost(1, 1), [cost(500, 9)]), 0);
    }

    #[test]
    fn encoding_needs_no_place() {
        // Would break: long generations at the sequence limit block requests that only encode.
        assert_eq!(LIMITS.joining(cost(4, 4), [cost(10, 0), cost(10, 1)]), 1);
    }

    #[test]
    fn queue_is_bounded() {
        // Would break: an overloaded coordinator queues without end instead of refusing at once.
        assert!(LIMITS.may_wait(1));
        assert!(!LIMITS.may_wait(2));
    }

    proptest! {
        #[test]
        fn limits_hold(running in (0usize..150, 0usize..6), waiting in prop::collection::vec((0usize..60, 0usize..3), 0..20)) {
            // Would break: a batch of several requests exceeds the limits, or a free place is left empty.
            let running = cost(running.0, running.1);
            let waiting: Vec<Cost> = waiting.into_iter().map(|(t, s)| cost(t, s)).collect();
            let joined = LIMITS.joining(running, waiting.iter().copied());
            let held = |n: usize| waiting[..n].iter().fold(running, |h, c| cost(h.tokens + c.tokens, h.sequences + c.sequences));
            let fits = |h: Cost| h.tokens <= LIMITS.tokens_max && h.sequences <= LIMITS.sequences_max;
            if joined > 0 && fits(running) && fits(held(1)) {
                prop_assert!(fits(held(joined)));
            }
            if joined < waiting.len() {
                prop_assert!(!fits(held(joined + 1)));
            }
        }
    }
}
