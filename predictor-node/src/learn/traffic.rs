//! The newest labels, within a bound.

use std::{collections::VecDeque, sync::Arc};

use sida_routing::{Labels, learning::Learning};

/// A ring of labelled sequences, the oldest first.
pub(crate) struct Traffic {
    learning: Learning,
    sequences: VecDeque<Arc<Labels>>,
    /// Of all sequences. Invariant: at most `learning.tokens_max`.
    tokens: usize,
    /// Tokens that came since it was last time to learn.
    new: usize,
}

/// What a net learns from, and what it is tested on, which is newer.
pub(crate) struct Parts {
    pub(crate) learnt: Vec<Arc<Labels>>,
    pub(crate) tested: Vec<Arc<Labels>>,
}

impl Traffic {
    pub(crate) fn new(learning: Learning) -> Self {
        Self { learning, sequences: VecDeque::new(), tokens: 0, new: 0 }
    }

    /// Tokens that are kept.
    pub(crate) fn tokens(&self) -> usize {
        self.tokens
    }

    /// Keeps the labels of one more sequence, and forgets the oldest in their place.
    pub(crate) fn push(&mut self, labels: Labels) {
        self.tokens += labels.tokens().len();
        self.new += labels.tokens().len();
        self.sequences.push_back(Arc::new(labels));
        while self.tokens > self.learning.tokens_max
            && let Some(oldest) = self.sequences.pop_front()
        {
            self.tokens -= oldest.tokens().len();
        }
    }

    /// What is to be learnt from, if it is time.
    pub(crate) fn due(&mut self) -> Option<Parts> {
        if !self.learning.is_due(self.new) {
            return None;
        }
        self.new = 0;
        let lengths: Vec<usize> = self.sequences.iter().map(|labels| labels.tokens().len()).collect();
        let count = self.learning.learnt(&lengths)?;
        let mut sequences = self.sequences.iter().cloned();
        let learnt = sequences.by_ref().take(count).collect();
        Some(Parts { learnt, tested: sequences.collect() })
    }
}

#[cfg(test)]
mod tests {
    use sida_routing::{ExpertId, LabelsExtent};

    use super::*;

    fn labels(number: u32, tokens: usize) -> Labels {
        let extent = LabelsExtent { layers: 1, num_experts: 2, kept: 1 };
        Labels::new(vec![number; tokens], extent, vec![ExpertId(0); tokens], vec![1.0; tokens]).unwrap()
    }

    /// The ring would grow without a bound, or a net be tested on older traffic than it learns from.
    #[test]
    fn the_newest_are_kept_and_the_newest_of_them_are_tested() {
        let mut traffic = Traffic::new(Learning { tokens_max: 24 });
        let mut trainings = Vec::new();
        for number in 0..20 {
            traffic.push(labels(number, 2));
            assert!(traffic.tokens() <= 24);
            if let Some(Parts { learnt, tested }) = traffic.due() {
                let numbers = |part: &[Arc<Labels>]| part.iter().map(|labels| labels.tokens()[0]).collect::<Vec<_>>();
                trainings.push((numbers(&learnt), numbers(&tested)));
            }
        }
        assert_eq!(trainings.len(), 6, "one for each quarter of the ring");
        assert_eq!(trainings[0], (vec![0, 1], vec![2]));
        assert_eq!(trainings[5], ((6..17).collect(), vec![17]));
        // More than fits at all.
        traffic.push(labels(99, 25));
        assert_eq!((traffic.tokens(), traffic.due().is_none()), (0, true));
    }
}
