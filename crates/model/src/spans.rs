//! A batch is its sequences one after another, row by row, without padding: the lengths say who owns which
//! rows.

use std::ops::Range;

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

    /// The sequences in at most `count` runs of about as many rows each.
    pub fn runs(&self, count: usize) -> Vec<Spans> {
        let mut runs = Vec::with_capacity(count);
        let (mut first, mut start) = (0, 0);
        for run in 1..=count {
            let cut = self.rows() * run / count;
            let end = self.ends.partition_point(|&end| end <= cut).max(first);
            let end = if run == count { self.ends.len() } else { end };
            if end > first {
                runs.push(Self { ends: self.ends[first..end].iter().map(|end| end - start).collect() });
                (first, start) = (end, self.ends[end - 1]);
            }
        }
        runs
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
    fn runs_hold_every_sequence_once() {
        for lengths in [vec![], vec![5], vec![3, 3, 3, 3], vec![100, 1, 1, 1], vec![1, 1, 1, 100], vec![0, 2, 0, 2, 0]]
        {
            let spans = Spans::new(lengths.iter().copied());
            for count in 1..6 {
                let runs = spans.runs(count);
                assert!(runs.len() <= count);
                let joined: Vec<usize> = runs.iter().flat_map(|run| run.ranges().map(|range| range.len())).collect();
                assert_eq!(joined, lengths, "{count}");
            }
        }
        let spans = Spans::new([2, 0, 3]);
        assert_eq!([0, 1, 2, 4, 5].map(|row| spans.holder(row)), [Some(0), Some(0), Some(2), Some(2), None]);
        let halves: Vec<usize> = Spans::new([4; 10]).runs(2).iter().map(Spans::rows).collect();
        assert_eq!(halves, [20, 20]);
    }
}
