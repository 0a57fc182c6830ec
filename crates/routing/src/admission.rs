//! Who joins the running batch, in order. The coordinator asks twice: before it predicts (what to take from the queue) and
//! before each decode step (what joins the sequences that are running). In which order requests wait, and how many may, is
//! said by [`crate::fairness`].

use std::iter::Sum;

/// What a request adds to the batch.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Cost {
    /// Rows that pass through the model when it joins: its prompt, and its targets if it is scored.
    pub tokens: usize,
    /// Places it keeps among the running sequences afterwards. 0 for a request for states, which is gone then.
    pub sequences: usize,
    /// Memory that is reserved for its keys and values until it ends: of its input, and of the most tokens that it
    /// may decode. 0 for a request for an encoder's states.
    pub cache_bytes: u64,
}

/// Bounds of one batch and of the queue before it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Limits {
    /// Rows of one pass through the model.
    pub tokens_max: usize,
    /// Rows of prompts in one step, where others are decoding and wait for its end.
    pub prefill_tokens_max: usize,
    /// Sequences that run at the same time.
    pub sequences_max: usize,
    /// Memory for keys and values of all sequences that run at the same time.
    pub cache_bytes_max: u64,
    /// Requests that wait.
    pub queue_max: usize,
    /// Tokens that wait: of prompts, and of the longest answers that may be given to them.
    pub queue_tokens_max: usize,
    /// The part of the queue that one client may hold while others wait, in requests as in tokens. Above 0, at most 1.
    pub client_queue_share: f64,
}

impl Cost {
    /// What both take together.
    fn and(self, other: Self) -> Self {
        Self {
            tokens: self.tokens.saturating_add(other.tokens),
            sequences: self.sequences.saturating_add(other.sequences),
            cache_bytes: self.cache_bytes.saturating_add(other.cache_bytes),
        }
    }
}

impl Sum for Cost {
    fn sum<I: Iterator<Item = Self>>(costs: I) -> Self {
        costs.fold(Self::default(), Self::and)
    }
}

impl Limits {
    /// How many of `waiting`, in their order, join a batch that already holds `running`. Nobody
    /// overtakes: a request that does not fit holds back those behind it, so that none starves. One that is
    /// larger than the limits by itself joins when nothing else is there.
    pub fn joining(&self, running: Cost, waiting: impl IntoIterator<Item = Cost>) -> usize {
        let mut held = running;
        let mut joined = 0;
        for cost in waiting {
            let together = held.and(cost);
            let alone = held == Cost::default();
            if !self.allow(together, cost) && !alone {
                break;
            }
            held = together;
            joined += 1;
        }
        joined
    }

    /// How many sequences can run at the same time where all are of requests like this, each of so many steps: an answer of
    /// one step is gone with its pass, so that only the rows of a pass bound them.
    pub fn places(&self, request: Cost, steps: usize) -> usize {
        let own = request.sequences.max(1);
        let of_rows = (self.tokens_max / request.tokens.max(1)).saturating_mul(steps).saturating_mul(own);
        if request.sequences == 0 {
            return of_rows.max(1);
        }
        let bytes = self.cache_bytes_max.saturating_mul(own as u64) / request.cache_bytes.max(1);
        of_rows.min(self.sequences_max).min(usize::try_from(bytes).unwrap_or(usize::MAX)).max(own)
    }

    /// Whether a batch of all `together` is within the limits; those of what the last of them does not take do not
    /// count.
    fn allow(&self, together: Cost, last: Cost) -> bool {
        together.tokens <= self.tokens_max
            && (last.sequences == 0 || together.sequences <= self.sequences_max)
            && (last.cache_bytes == 0 || together.cache_bytes <= self.cache_bytes_max)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const LIMITS: Limits = Limits {
        tokens_max: 100,
        prefill_tokens_max: 100,
        sequences_max: 4,
        cache_bytes_max: 1000,
        queue_max: 2,
        queue_tokens_max: 1000,
        client_queue_share: 1.0,
    };

    fn cost(tokens: usize, sequences: usize) -> Cost {
        Cost { tokens, sequences, cache_bytes: 0 }
    }

    fn caching(cache_bytes: u64) -> Cost {
        Cost { tokens: 1, sequences: 1, cache_bytes }
    }

    #[test]
    fn order_of_arrival() {
        // Would break: a stream of short requests starves a long one.
        assert_eq!(LIMITS.joining(cost(0, 0), [cost(90, 1), cost(20, 1), cost(1, 1)]), 1);
        assert_eq!(LIMITS.joining(caching(500), [caching(600), caching(1)]), 0);
    }

    #[test]
    fn oversized_request_runs_alone() {
        // Would break: a request larger than the batch limit waits for ever and blocks the queue.
        assert_eq!(LIMITS.joining(cost(0, 0), [cost(500, 9), cost(1, 0)]), 1);
        assert_eq!(LIMITS.joining(cost(1, 1), [cost(500, 9)]), 0);
    }

    #[test]
    fn encoding_needs_no_place() {
        // Would break: long generations at the limits of sequences and memory block requests that only encode.
        let full = Cost { cache_bytes: 1000, ..cost(4, 4) };
        assert_eq!(LIMITS.joining(full, [cost(10, 0), cost(10, 1)]), 1);
    }

    #[test]
    fn memory_is_used_to_its_last_byte() {
        // Would break: a sequence that fits waits, or one that does not fit joins and takes memory from the others.
        assert_eq!(LIMITS.joining(caching(400), [caching(300), caching(300), caching(1)]), 2);
        assert_eq!(LIMITS.joining(caching(400), [caching(601)]), 0);
        assert_eq!(LIMITS.joining(caching(400), [caching(u64::MAX)]), 0);
    }

    #[test]
    fn what_bounds_those_that_run_together() {
        // Would break: how long a request waits is told by a bound that is not its own.
        assert_eq!(LIMITS.places(cost(10, 0), 1), 10);
        assert_eq!(LIMITS.places(cost(500, 0), 1), 1);
        assert_eq!(LIMITS.places(cost(10, 1), 1), 4);
        assert_eq!(LIMITS.places(cost(50, 1), 1), 2);
        assert_eq!(LIMITS.places(cost(50, 1), 100), 4);
        assert_eq!(LIMITS.places(caching(400), 100), 2);
        assert_eq!(LIMITS.places(cost(10, 9), 1), 9, "larger than the limits by itself");
    }

    fn costs(most: usize) -> impl Strategy<Value = Vec<Cost>> {
        let cost = (0usize..60, 0usize..3, 0u64..700).prop_map(|(tokens, sequences, cache_bytes)| Cost {
            tokens,
            sequences,
            // What is encoded and gone keeps nothing.
            cache_bytes: if sequences == 0 { 0 } else { cache_bytes },
        });
        prop::collection::vec(cost, 0..most)
    }

    proptest! {
        #[test]
        fn limits_hold(running in costs(3), waiting in costs(20)) {
            // Would break: a batch of several requests exceeds the limits, or a free place is left empty.
            let running: Cost = running.into_iter().sum();
            let joined = LIMITS.joining(running, waiting.iter().copied());
            let held = |n: usize| [running].into_iter().chain(waiting[..n].iter().copied()).sum::<Cost>();
            let fits = |held: Cost| {
                held.tokens <= LIMITS.tokens_max
                    && held.sequences <= LIMITS.sequences_max
                    && held.cache_bytes <= LIMITS.cache_bytes_max
            };
            if joined > 0 && fits(running) && fits(held(1)) {
                prop_assert!(fits(held(joined)));
            }
            if joined < waiting.len() {
                prop_assert!(!fits(held(joined + 1)));
            }
        }

        #[test]
        fn nobody_starves(waiting in costs(40), ends in prop::collection::vec(any::<prop::sample::Index>(), 200)) {
            // Would break: a request that fits into the whole memory waits for ever behind or beside smaller ones.
            let (mut running, mut next, mut ends) = (Vec::<Cost>::new(), 0, ends.into_iter());
            while next < waiting.len() {
                let sequences = running.iter().copied().sum();
                let joined = LIMITS.joining(sequences, waiting[next..].iter().copied());
                running.extend(&waiting[next..next + joined]);
                next += joined;
                prop_assert!(running.iter().map(|cost| cost.cache_bytes).sum::<u64>() <= LIMITS.cache_bytes_max);
                // Somebody finishes, in any order.
                if let Some(end) = ends.next().filter(|_| !running.is_empty()) {
                    running.swap_remove(end.index(running.len()));
                }
                prop_assert!(joined > 0 || ends.len() > 0, "{} of {} wait", waiting.len() - next, waiting.len());
            }
        }
    }
}
