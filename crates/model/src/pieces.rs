//! A batch in one piece per thread: a block's norm, products and attention run from end to end over a piece's
//! rows, so that threads meet once per block and not after every product. No row's bits depend on its piece
//! (see `cpu`).

use rayon::prelude::*;

use crate::Spans;

/// Calls `work` for pieces of `rows` (n, width) that hold whole sequences, with those sequences' spans.
pub(crate) fn by_sequence(rows: &mut [f32], width: usize, spans: &Spans, work: impl Fn(&mut [f32], &Spans) + Sync) {
    let count = count(spans.rows(), width);
    if count == 1 {
        return work(rows, spans);
    }
    let mut rest = rows;
    let pieces: Vec<(&mut [f32], Spans)> = spans
        .runs(count)
        .into_iter()
        .map(|run| (rest.split_off_mut(..run.rows() * width).expect("runs add up to all rows"), run))
        .collect();
    pieces.into_par_iter().for_each(|(rows, spans)| work(rows, &spans));
}

/// Calls `work` for pieces of `rows` (n, width), cut anywhere between rows.
pub(crate) fn by_row(rows: &mut [f32], width: usize, work: impl Fn(&mut [f32]) + Send + Sync) {
    let n = rows.len() / width;
    match count(n, width) {
        1 => work(rows),
        count => rows.par_chunks_mut(n.div_ceil(count) * width).for_each(work),
    }
}

/// How many pieces. Each passes over all weights, so a piece of fewer rows than half of what those are wide would
/// cost more than it saves; then the products are left to split themselves.
fn count(rows: usize, width: usize) -> usize {
    let threads = rayon::current_num_threads();
    if rows / threads >= width.div_ceil(2) { threads } else { 1 }
}
