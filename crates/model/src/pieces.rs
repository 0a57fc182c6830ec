//! A batch in one piece per thread: blocks run from end to end over a piece's rows, norms, products and attention, so
//! that threads meet once and not after every product. No row's bits depend on its piece (see `cpu`).

use crate::{Spans, cpu_operations::Scratch, side_by_side};

/// Calls `work` for pieces of h and x, both (n, width), that hold whole sequences, with those sequences' spans. `work` makes
/// x of h; the last argument says whether there are other pieces.
pub(crate) fn by_sequence(
    h: &mut [f32],
    x: &mut [f32],
    width: usize,
    spans: &Spans,
    scratch: &mut Scratch,
    work: impl Fn(&mut [f32], &mut [f32], &Spans, &mut Scratch) + Sync,
) {
    let count = count(spans.rows(), width);
    if count == 1 {
        return work(h, x, spans, scratch);
    }
    let mut own_h: Vec<Option<&mut [f32]>> = by_span(h, width, spans);
    let mut own_x: Vec<Option<&mut [f32]>> = by_span(x, width, spans);
    let mut piece = |share: Vec<usize>| -> Vec<(&mut [f32], &mut [f32])> {
        let own = |sequence: usize| Some((own_h[sequence].take()?, own_x[sequence].take()?));
        share.into_iter().map(own).map(|rows| rows.expect("a sequence is in one share")).collect()
    };
    let pieces = spans.shares(count).into_iter().map(&mut piece).collect();
    // The sequences of a piece lie apart: it computes on a copy.
    side_by_side::each(pieces, |mut sequences: Vec<(&mut [f32], &mut [f32])>| {
        let spans = Spans::new(sequences.iter().map(|(h, _)| h.len() / width));
        let mut h = Vec::with_capacity(spans.rows() * width);
        sequences.iter().for_each(|(own, _)| h.extend_from_slice(own));
        let mut x = vec![0.0; h.len()];
        work(&mut h, &mut x, &spans, &mut Scratch::default());
        for ((own_h, own_x), rows) in sequences.iter_mut().zip(spans.ranges()) {
            let values = rows.start * width..rows.end * width;
            own_h.copy_from_slice(&h[values.clone()]);
            own_x.copy_from_slice(&x[values]);
        }
    });
}

fn by_span<'r>(mut rows: &'r mut [f32], width: usize, spans: &Spans) -> Vec<Option<&'r mut [f32]>> {
    spans.ranges().map(|range| rows.split_off_mut(..range.len() * width)).collect()
}

/// Calls `work` for pieces of h and x, both (n, width), cut anywhere between rows.
pub(crate) fn by_row(
    h: &mut [f32],
    x: &[f32],
    width: usize,
    scratch: &mut Scratch,
    work: impl Fn(&mut [f32], &[f32], &mut Scratch) + Sync,
) {
    let n = h.len() / width;
    match count(n, width) {
        1 => work(h, x, scratch),
        count => {
            let values = n.div_ceil(count) * width;
            let pieces = h.chunks_mut(values).zip(x.chunks(values)).collect();
            side_by_side::each(pieces, |(h, x)| work(h, x, &mut Scratch::default()));
        }
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
