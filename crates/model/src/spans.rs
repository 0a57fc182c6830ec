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
