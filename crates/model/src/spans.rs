//! A batch is its sequences one after another, row by row, without padding: the lengths say who owns which
//! rows.

use std::{cmp::Reverse, ops::Range};

/// The lengths of the sequences that make up a batch's rows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Spans {
    /// Where each sequence ends, ascending.
    ends: Vec<usize>,
}

impl Spans {
    /// Sequences of these lengths, in this order.
    pub fn new(lengths: impl IntoIterator<Item = usize>) -> Self {
        let mut rows = 0;
        let ends = lengths.into_iter().map(|length| {
            rows += length;
            rows
        });
        Self { ends: ends.collect() }
    }

    /// One token of each of `sequences`: a decoding step.
    pub fn single_tokens(sequences: usize) -> Self {
        Self { ends: (1..=sequences).collect() }
    }

    /// The rows of each sequence.
    pub fn ranges(&self) -> impl ExactSizeIterator<Item = Range<usize>> + '_ {
        self.ends.iter().enumerate().map(|(sequence, &end)| self.start(sequence)..end)
    }

    /// The rows of one sequence. Panics if there is no such sequence.
    pub fn range(&self, sequence: usize) -> Range<usize> {
        self.start(sequence)..self.ends[sequence]
    }

    /// Which sequence a row is of; `None` beyond the last.
    pub fn holder(&self, row: usize) -> Option<usize> {
        let sequence = self.ends.partition_point(|&end| end <= row);
        (sequence < self.ends.len()).then_some(sequence)
    }

    /// The sequences in at most `count` shares of about as many rows each, the longest first: each goes to the share
    /// that has least so far. None of them is empty.
    pub fn shares(&self, count: usize) -> Vec<Vec<usize>> {
        let mut sequences: Vec<usize> = (0..self.len()).collect();
        sequences.sort_by_key(|&sequence| Reverse(self.range(sequence).len()));
        let mut shares = vec![(0, Vec::new()); count.min(self.len())];
        for sequence in sequences {
            let least = shares.iter_mut().min_by_key(|(rows, own)| (*rows, own.len())).expect("a share for the first");
            least.0 += self.range(sequence).len();
            least.1.push(sequence);
        }
        shares.into_iter().map(|(_, own)| own).collect()
    }

    /// How many rows all sequences have.
    pub fn rows(&self) -> usize {
        self.ends.last().copied().unwrap_or(0)
    }

    /// How many sequences.
    pub fn len(&self) -> usize {
        self.ends.len()
    }

    /// Whether there is no sequence.
    pub fn is_empty(&self) -> bool {
        self.ends.is_empty()
    }

    fn start(&self, sequence: usize) -> usize {
        if sequence == 0 { 0 } else { self.ends[sequence - 1] }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A sequence would be computed twice or not at all, or one thread would do all the work.
    #[test]
    fn shares_hold_every_sequence_once() {
        for lengths in [vec![], vec![5], vec![3, 3, 3, 3], vec![100, 1, 1, 1], vec![1, 1, 1, 100], vec![0, 2, 0, 2, 0]]
        {
            let spans = Spans::new(lengths.iter().copied());
            for count in 1..6 {
                let shares = spans.shares(count);
                assert!(shares.len() <= count && shares.iter().all(|share| !share.is_empty()));
                let mut joined = shares.concat();
                joined.sort_unstable();
                assert_eq!(joined, (0..lengths.len()).collect::<Vec<_>>(), "{count}");
            }
        }
        let spans = Spans::new([2, 0, 3]);
        assert_eq!([0, 1, 2, 4, 5].map(|row| spans.holder(row)), [Some(0), Some(0), Some(2), Some(2), None]);
        assert_eq!(Spans::new([3, 20, 9, 10, 1]).shares(2), [vec![1, 4], vec![3, 2, 0]]);
    }
}
