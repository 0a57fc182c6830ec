//! A batch in one piece per thread: blocks run from end to end over a piece's rows, norms, products and attention, so
//! that threads meet once and not after every product. No row's bits depend on its piece (see `cpu`).

use crate::{Spans, side_by_side};

/// Calls `work` for pieces of `rows` (n, width) that hold whole sequences, with those sequences' spans.
pub(crate) fn by_sequence(rows: &mut [f32], width: usize, spans: &Spans, work: impl Fn(&mut [f32], &Spans) + Sync) {
    let count = count(spans.rows(), width);
    if count == 1 {
        return work(rows, spans);
    }
    let mut rest = rows;
    let own = spans.ranges().map(|range| rest.split_off_mut(..range.len() * width));
    let mut own: Vec<Option<&mut [f32]>> = own.collect();
    let mut piece = |share: Vec<usize>| -> Vec<&mut [f32]> {
        share.into_iter().map(|sequence| own[sequence].take().expect("a sequence is in one share")).collect()
    };
    let pieces = spans.shares(count).into_iter().map(&mut piece).collect();
    // The sequences of a piece lie apart: it computes on a copy.
    side_by_side::each(pieces, |mut sequences: Vec<&mut [f32]>| {
        let mut rows = sequences.concat();
        work(&mut rows, &Spans::new(sequences.iter().map(|rows| rows.len() / width)));
        let mut from = &rows[..];
        for to in &mut sequences {
            to.copy_from_slice(from.split_off(..to.len()).expect("as many rows as there were"));
        }
    });
}

/// Calls `work` for pieces of `rows` (n, width), cut anywhere between rows.
pub(crate) fn by_row(rows: &mut [f32], width: usize, work: impl Fn(&mut [f32]) + Send + Sync) {
    let n = rows.len() / width;
    match count(n, width) {
        1 => work(rows),
        count => side_by_side::each(rows.chunks_mut(n.div_ceil(count) * width).collect(), work),
    }
}

/// How many pieces: each thread gets as many. Each piece passes over all weights, so one of fewer rows than half of what those
/// are wide would cost more than it saves; then the products are left to split themselves. And each holds what it makes of
/// its rows, so one of many more would not find that in its caches again.
fn count(rows: usize, width: usize) -> usize {
    let threads = rayon::current_num_threads();
    let own = rows / threads;
    if own >= width.div_ceil(2) { threads * (own / width).max(1) } else { 1 }
}
