//! Attention on rows: scores with a factor and a bias per distance, where there are, and softmax over the keys a query may see.
//! One function serves the encoder, the decoder's self-attention over its cache, and cross-attention: they
//! differ in where keys and values lie.
//!
//! Invariant: a query's output depends on its own row and its own sequence's keys and values, in the order
//! of the keys; neither tiles nor threads nor other sequences change a bit.

#![allow(clippy::needless_range_loop, reason = "a tile is indexed by row and column")]

use std::cell::RefCell;

use rayon::prelude::*;

use super::{
    lanes::{self, Kernel, LANES, Lanes},
    norm::softmax_row,
    panel,
};
use crate::{GivenUp, StillWanted, position_bias::PositionBias};

/// Less than this runs on the calling thread: waking another costs more than it saves.
const PARALLEL_MACS_MIN: usize = 400_000;
/// Queries per piece of parallel work.
const QUERIES_PER_TASK: usize = 48;
/// Queries at a time at most.
const TILE_ROWS_MAX: usize = 6;

/// Rows of heads where they lie: head h of row r is the `d_kv` floats from `r * stride + offset + h * d_kv`.
/// So one fused product of queries, keys and values is used without being taken apart.
#[derive(Clone, Copy)]
pub struct HeadRows<'a> {
    /// The rows.
    pub values: &'a [f32],
    /// Floats from one row to the next.
    pub stride: usize,
    /// Where head 0 begins in a row.
    pub offset: usize,
}

/// What one sequence brings.
#[derive(Clone, Copy)]
pub struct Sequence<'a> {
    /// How many new tokens.
    pub query_rows: usize,
    /// Where the first of them is among the keys.
    pub first_position: usize,
    /// How many tokens can be attended to.
    pub key_rows: usize,
    /// (query_rows, heads, d_kv)
    pub queries: HeadRows<'a>,
    /// (key_rows, kv_heads, d_kv)
    pub keys: HeadRows<'a>,
    /// (key_rows, kv_heads, d_kv)
    pub values: HeadRows<'a>,
}

/// What all sequences share.
#[derive(Clone, Copy)]
pub struct Attention<'a> {
    /// Heads, side by side in a row.
    pub heads: usize,
    /// Heads of keys and values; as many heads of queries share each.
    pub kv_heads: usize,
    /// Width of a head.
    pub d_kv: usize,
    /// What scores are multiplied by.
    pub scale: f32,
    /// Whether a query sees only keys up to its own position.
    pub causal: bool,
    /// How many keys up to its own position a query sees, if not all.
    pub window: Option<usize>,
    /// What is added to a score for its distance.
    pub bias: Option<&'a PositionBias>,
}

/// A thread's room for one head.
#[derive(Default)]
struct Room {
    /// Scores of the queries of a tile: [`TILE_ROWS_MAX`] rows of whole vectors of keys.
    scores: Vec<f32>,
    /// The head's keys, turned (see `panel`).
    turned: Vec<f32>,
}

thread_local! {
    static ROOM: RefCell<Room> = RefCell::default();
}

impl Attention<'_> {
    /// The head of keys and values that a head of queries shares with its neighbours.
    #[inline(always)]
    fn kv_head(&self, head: usize) -> usize {
        head / (self.heads / self.kv_heads)
    }

    /// `softmax(scale * q K^T + bias) V` for each query and head, into `out` (all query rows, heads * d_kv), sequence
    /// after sequence. A sequence without keys gives zeros. Ends with an error, and `out` half done, when it is not wanted any
    /// more.
    ///
    /// Panics when a length does not fit: the blocks made all of them.
    pub fn run(
        &self,
        sequences: &[Sequence<'_>],
        out: &mut [f32],
        still_wanted: StillWanted<'_>,
    ) -> Result<(), GivenUp> {
        still_wanted.check()?;
        let width = self.heads * self.d_kv;
        let rows: usize = sequences.iter().map(|sequence| sequence.query_rows).sum();
        assert_eq!(out.len(), rows * width, "out is ({rows}, {width})");
        let macs: usize = sequences.iter().map(|sequence| 2 * sequence.query_rows * sequence.key_rows * width).sum();
        let parallel = macs >= PARALLEL_MACS_MIN && rows > 1;
        let mut tasks = Vec::new();
        let mut rest = out;
        for sequence in sequences {
            sequence.check(self);
            let own = rest.split_off_mut(..sequence.query_rows * width).expect("out holds every query row");
            if !parallel {
                self.queries(sequence, 0, own);
                continue;
            }
            let pieces = own.chunks_mut(QUERIES_PER_TASK * width).enumerate();
            tasks.extend(pieces.map(|(piece, out)| (sequence, piece * QUERIES_PER_TASK, out)));
        }
        tasks.into_par_iter().try_for_each(|(sequence, first_query, out)| {
            still_wanted.check()?;
            self.queries(sequence, first_query, out);
            Ok(())
        })
    }

    /// The queries from `first_query` on that `out` has rows for.
    fn queries(&self, sequence: &Sequence<'_>, first_query: usize, out: &mut [f32]) {
        if sequence.key_rows == 0 {
            out.fill(0.0);
            return;
        }
        ROOM.with_borrow_mut(|room| {
            let keys = sequence.key_rows.next_multiple_of(LANES);
            let scores = aligned(&mut room.scores, TILE_ROWS_MAX * keys);
            let turned = aligned(&mut room.turned, keys * self.d_kv + 2 * TILE_ROWS_MAX * LANES);
            lanes::run(Queries { attention: self, sequence, first_query, out, scores, turned });
        });
    }
}

impl Sequence<'_> {
    fn check(&self, attention: &Attention<'_>) {
        let (width, kv_width) = (attention.heads * attention.d_kv, attention.kv_heads * attention.d_kv);
        let holds = |of: HeadRows<'_>, rows: usize, width: usize| {
            rows == 0 || of.values.len() >= (rows - 1) * of.stride + of.offset + width
        };
        assert!(attention.heads.is_multiple_of(attention.kv_heads), "heads of queries share those of keys evenly");
        assert!(holds(self.queries, self.query_rows, width), "queries are ({}, {width})", self.query_rows);
        assert!(holds(self.keys, self.key_rows, kv_width), "keys are ({}, {kv_width})", self.key_rows);
        assert!(holds(self.values, self.key_rows, kv_width), "values are ({}, {kv_width})", self.key_rows);
        assert!(!attention.causal || self.first_position + self.query_rows <= self.key_rows, "a query is its own key");
    }
}

/// Some queries of one sequence.
struct Queries<'a, 's> {
    attention: &'a Attention<'a>,
    sequence: &'a Sequence<'s>,
    first_query: usize,
    out: &'a mut [f32],
    /// ([`TILE_ROWS_MAX`], keys in whole vectors)
    scores: *mut f32,
    /// (keys in whole vectors, d_kv), and what a tile of them needs.
    turned: *mut f32,
}

impl Kernel for Queries<'_, '_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<L: Lanes>(self) {
        // SAFETY: `Sequence::check` saw that all rows are there. The tiles fit the registers.
        unsafe {
            match L::TILE_ROWS {
                4 => self.heads::<L, 6, 3>(),
                2 => self.heads::<L, 2, 3>(),
                _ => self.heads::<L, 1, 4>(),
            }
        }
    }
}

impl Queries<'_, '_> {
    /// Every head: R queries at a time.
    #[inline(always)]
    unsafe fn heads<L: Lanes, const R: usize, const C: usize>(mut self) {
        let Attention { heads, d_kv, .. } = *self.attention;
        let rows = self.out.len() / (heads * d_kv);
        let turned = rows > 1 && d_kv.is_multiple_of(LANES);
        for head in 0..heads {
            let mut row = 0;
            // SAFETY: rows of this task, heads of this model.
            unsafe {
                let is_first = head == 0 || self.attention.kv_head(head) != self.attention.kv_head(head - 1);
                if turned && is_first {
                    self.turn_keys::<L>(head);
                }
                while row + R <= rows {
                    self.tile::<L, R, C>(head, row, turned);
                    row += R;
                }
                match rows - row {
                    5 => self.tile::<L, 5, 3>(head, row, turned),
                    4 => self.tile::<L, 4, 3>(head, row, turned),
                    3 => self.tile::<L, 3, 3>(head, row, turned),
                    2 => self.tile::<L, 2, 3>(head, row, turned),
                    _ => {
                        while row < rows {
                            self.tile::<L, 1, 6>(head, row, turned);
                            row += 1;
                        }
                    }
                }
            }
        }
    }

    /// The keys of a head, turned, 16 at a time; the last one again where there are fewer.
    #[inline(always)]
    unsafe fn turn_keys<L: Lanes>(&mut self, head: usize) {
        let (d_kv, keys) = (self.attention.d_kv, self.sequence.keys);
        let last = self.sequence.key_rows - 1;
        for key in (0..=last).step_by(LANES) {
            // SAFETY: no key beyond the last is read; `turned` has room for all.
            unsafe {
                let column = self.attention.kv_head(head) * d_kv;
                let load = |c: usize, at: usize| L::load(keys.head((key + c).min(last), column + at));
                panel::turn::<L>(load, d_kv, self.turned.add(key * d_kv));
            }
        }
    }

    /// One head of R queries: scores, softmax, weighted sum of values.
    #[inline(always)]
    unsafe fn tile<L: Lanes, const R: usize, const C: usize>(&mut self, head: usize, row: usize, turned: bool) {
        let Attention { d_kv, heads, causal, bias, scale, window, .. } = *self.attention;
        let kv_column = self.attention.kv_head(head) * d_kv;
        let position = self.sequence.first_position + self.first_query + row;
        let keys = if causal { position + R } else { self.sequence.key_rows }; // that the last of these queries sees
        let stride = keys.next_multiple_of(LANES);
        // SAFETY: all pointers are to rows and heads that exist; `scores` has room for the rows of a tile.
        unsafe {
            let scores = self.scores;
            if turned {
                let queries = self.sequence.queries.head(self.first_query + row, head * d_kv);
                let waiting = self.turned.add(self.sequence.key_rows.next_multiple_of(LANES) * d_kv);
                for key in (0..keys).step_by(LANES) {
                    let panel = self.turned.add(key * d_kv);
                    let query_stride = self.sequence.queries.stride;
                    panel::tile::<L, R>(queries, query_stride, d_kv, panel, waiting, scores.add(key), stride);
                }
            } else {
                let query = |r| self.sequence.queries.head(self.first_query + row + r, head * d_kv);
                let queries = std::array::from_fn(query);
                let mut key = 0;
                while key + C <= keys {
                    dots::<L, R, C>(queries, self.sequence.keys, key, kv_column, d_kv, scores, stride);
                    key += C;
                }
                while key < keys {
                    dots::<L, R, 1>(queries, self.sequence.keys, key, kv_column, d_kv, scores, stride);
                    key += 1;
                }
            }
            for r in 0..R {
                let scores = std::slice::from_raw_parts_mut(scores.add(r * stride), stride);
                // Whole vectors for bias and softmax: what is beyond the last key counts nothing.
                if let Some(last) = scores.last_chunk_mut::<LANES>() {
                    let own = LANES - (stride - keys);
                    for l in 0..LANES {
                        last[l] = if l < own { last[l] } else { f32::NEG_INFINITY };
                    }
                }
                if scale != 1.0 {
                    scores.iter_mut().for_each(|score| *score *= scale);
                }
                if let Some(bias) = bias {
                    bias.add_to(head, position + r, scores);
                }
                if causal {
                    // A key that is not seen counts nothing, and adds nothing.
                    let seen = position + r + 1;
                    scores[seen..keys].fill(f32::NEG_INFINITY);
                    scores[..seen.saturating_sub(window.unwrap_or(seen))].fill(f32::NEG_INFINITY);
                }
                softmax_row(scores);
            }
            let out = std::array::from_fn(|r| self.out.as_mut_ptr().add(((row + r) * heads + head) * d_kv));
            for at in (0..d_kv).step_by(2 * LANES) {
                let (column, width) = (kv_column + at, d_kv - at);
                let out = out.map(|out| out.add(at));
                if width > LANES {
                    weighted_sum::<L, R, 2>(scores, stride, keys, self.sequence.values, column, width, out);
                } else {
                    weighted_sum::<L, R, 1>(scores, stride, keys, self.sequence.values, column, width, out);
                }
            }
        }
    }
}

impl HeadRows<'_> {
    /// The floats of a row from `at` on, counted from its head 0.
    #[inline(always)]
    unsafe fn head(&self, row: usize, at: usize) -> *const f32 {
        // SAFETY: the caller's row and column exist.
        unsafe { self.values.as_ptr().add(row * self.stride + self.offset + at) }
    }
}

/// `scores[r][key + c] = q[r] . k[key + c]`, each in the order of `dot_lanes`.
#[inline(always)]
unsafe fn dots<L: Lanes, const R: usize, const C: usize>(
    queries: [*const f32; R],
    keys: HeadRows<'_>,
    key: usize,
    column: usize,
    d_kv: usize,
    scores: *mut f32,
    scores_stride: usize,
) {
    // SAFETY: the caller's queries, keys and scores exist; the tail reads the floats that are left.
    unsafe {
        let keys: [*const f32; C] = std::array::from_fn(|c| keys.head(key + c, column));
        let mut sums = [[L::splat(0.0); C]; R];
        for at in (0..d_kv).step_by(LANES) {
            let q = queries.map(|query| load_up_to::<L>(query.add(at), d_kv - at));
            for c in 0..C {
                let k = load_up_to::<L>(keys[c].add(at), d_kv - at);
                for r in 0..R {
                    sums[r][c] = sums[r][c].fma(q[r], k);
                }
            }
        }
        let sums = L::sums(sums);
        for r in 0..R {
            scores.add(r * scores_stride + key).cast::<[f32; C]>().write_unaligned(sums[r]);
        }
    }
}

/// `out[r] = sum over keys of p[r][key] * v[key]` in the order of the keys, for V vectors of which the last
/// ends at `width` columns if those are fewer.
#[inline(always)]
unsafe fn weighted_sum<L: Lanes, const R: usize, const V: usize>(
    probabilities: *const f32,
    stride: usize,
    keys: usize,
    values: HeadRows<'_>,
    column: usize,
    width: usize,
    out: [*mut f32; R],
) {
    // SAFETY: `probabilities` is (R, stride), and the caller's values and out exist.
    unsafe {
        let mut sums = [[L::splat(0.0); V]; R];
        for key in 0..keys {
            let value = values.head(key, column);
            let v: [L; V] = std::array::from_fn(|i| load_up_to(value.add(i * LANES), width - i * LANES));
            for r in 0..R {
                let p = L::splat(*probabilities.add(r * stride + key));
                for i in 0..V {
                    sums[r][i] = sums[r][i].fma(p, v[i]);
                }
            }
        }
        for r in 0..R {
            for i in 0..V {
                let mut lanes = [0.0; LANES];
                sums[r][i].store(lanes.as_mut_ptr());
                let count = (width - i * LANES).min(LANES);
                std::ptr::copy_nonoverlapping(lanes.as_ptr(), out[r].add(i * LANES), count);
            }
        }
    }
}

/// 16 floats, or the `left` that there are; the other lanes are 0.
#[inline(always)]
unsafe fn load_up_to<L: Lanes>(from: *const f32, left: usize) -> L {
    // SAFETY: the caller has `left` floats.
    unsafe { if left >= LANES { L::load(from) } else { L::load_partial(from, left) } }
}

/// `len` floats of a buffer from a cache line's beginning on.
fn aligned(buffer: &mut Vec<f32>, len: usize) -> *mut f32 {
    const LINE: usize = 64;
    buffer.resize(buffer.len().max(len + LINE / size_of::<f32>()), 0.0);
    let start = buffer.as_mut_ptr();
    // SAFETY: the buffer is a line longer than `len`.
    unsafe { start.add(start.align_offset(LINE).min(LINE / size_of::<f32>())) }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    /// As T5's, without a bias.
    fn of_t5(heads: usize, d_kv: usize, causal: bool) -> Attention<'static> {
        Attention { heads, kv_heads: heads, d_kv, scale: 1.0, causal, window: None, bias: None }
    }

    fn values(n: usize, seed: usize) -> Vec<f32> {
        (0..n).map(|i| ((i * 7919 + seed * 104_729) % 1009) as f32 / 504.0 - 1.0).collect()
    }

    fn rows(values: &[f32], stride: usize, offset: usize) -> HeadRows<'_> {
        HeadRows { values, stride, offset }
    }

    /// Float64 and no tricks.
    fn plain(attention: &Attention<'_>, sequence: &Sequence<'_>) -> Vec<f64> {
        let Attention { heads, kv_heads, d_kv, scale, causal, window, .. } = *attention;
        let mut out = Vec::new();
        for query in 0..sequence.query_rows {
            for head in 0..heads {
                let of_head = |of: HeadRows<'_>, row: usize, head: usize, i: usize| {
                    f64::from(of.values[row * of.stride + of.offset + head * d_kv + i])
                };
                let own = |i| of_head(sequence.queries, query, head, i);
                let at = |of, row, i| of_head(of, row, head * kv_heads / heads, i);
                let end = if causal { sequence.first_position + query + 1 } else { sequence.key_rows };
                let keys = window.map_or(0, |window| end.saturating_sub(window))..end;
                let dot = |key| (0..d_kv).map(|i| own(i) * at(sequence.keys, key, i)).sum::<f64>();
                let shares: Vec<f64> = keys.clone().map(|key| (f64::from(scale) * dot(key)).exp()).collect();
                let sum: f64 = shares.iter().sum();
                let weighted =
                    |i| keys.clone().zip(&shares).map(move |(key, share)| share * at(sequence.values, key, i));
                out.extend((0..d_kv).map(|i| weighted(i).sum::<f64>() / sum));
            }
        }
        out
    }

    /// Attention would compute something else than its equation, for some shape.
    #[test]
    fn follows_its_equation() {
        for (heads, d_kv, queries, keys) in
            [(4, 32, 18, 18), (1, 7, 5, 9), (3, 20, 1, 33), (2, 64, 9, 6), (2, 49, 4, 1)]
        {
            for causal in [false, true] {
                if causal && queries > keys {
                    continue;
                }
                let width = heads * d_kv;
                let fused = values(queries.max(keys) * 3 * width, heads);
                let attention = of_t5(heads, d_kv, causal);
                let sequence = Sequence {
                    query_rows: queries,
                    first_position: if causal { keys - queries } else { 0 },
                    key_rows: keys,
                    queries: rows(&fused, 3 * width, 0),
                    keys: rows(&fused, 3 * width, width),
                    values: rows(&fused, 3 * width, 2 * width),
                };
                let mut out = vec![0.0; queries * width];
                attention.run(&[sequence], &mut out, StillWanted::default()).unwrap();
                for (i, (out, exact)) in out.iter().zip(plain(&attention, &sequence)).enumerate() {
                    assert!((f64::from(*out) - exact).abs() < 2e-5, "{heads}x{d_kv} {i}: {out} is not {exact}");
                }
            }
        }
    }

    /// Heads would read another head's keys, or queries beyond their window, where threads share a prompt.
    #[test]
    fn heads_share_keys_within_a_window() {
        let (heads, d_kv, rows_) = (4, 32, 130);
        for (kv_heads, window) in [(2, None), (1, Some(7)), (4, Some(129)), (2, Some(1))] {
            let attention = Attention { kv_heads, scale: 0.3, window, ..of_t5(heads, d_kv, true) };
            let stride = (heads + 2 * kv_heads) * d_kv;
            let fused = values(rows_ * stride, kv_heads);
            let sequence = |first: usize, count: usize| Sequence {
                query_rows: count,
                first_position: first,
                key_rows: first + count,
                queries: rows(&fused[first * stride..], stride, 0),
                keys: rows(&fused, stride, heads * d_kv),
                values: rows(&fused, stride, (heads + kv_heads) * d_kv),
            };
            let mut whole = vec![0.0; rows_ * heads * d_kv];
            attention.run(&[sequence(0, rows_)], &mut whole, StillWanted::default()).unwrap();
            for (out, exact) in whole.iter().zip(plain(&attention, &sequence(0, rows_))) {
                assert!((f64::from(*out) - exact).abs() < 2e-5, "{kv_heads} {window:?}: {out} is not {exact}");
            }
            for query in 0..rows_ {
                let mut alone = vec![0.0; heads * d_kv];
                attention.run(&[sequence(query, 1)], &mut alone, StillWanted::default()).unwrap();
                assert_eq!(alone, whole[query * heads * d_kv..][..heads * d_kv], "{kv_heads} {window:?}: {query}");
            }
        }
    }

    /// A token would change with its batch, with threads, or with how many tokens are decoded at once.
    #[test]
    fn every_query_is_the_same_alone() {
        let (heads, d_kv, keys) = (4, 24, 70);
        let width = heads * d_kv;
        let fused = values(keys * 3 * width, 3);
        for causal in [false, true] {
            let attention = of_t5(heads, d_kv, causal);
            let sequence = |first: usize, count: usize| Sequence {
                query_rows: count,
                first_position: first,
                key_rows: keys,
                queries: rows(&fused[first * 3 * width..], 3 * width, 0),
                keys: rows(&fused, 3 * width, width),
                values: rows(&fused, 3 * width, 2 * width),
            };
            let mut together = vec![0.0; 2 * keys * width];
            let all = [sequence(0, keys), sequence(0, keys)];
            attention.run(&all, &mut together, StillWanted::default()).unwrap();
            for query in 0..keys {
                let mut alone = vec![0.0; width];
                attention.run(&[sequence(query, 1)], &mut alone, StillWanted::default()).unwrap();
                assert_eq!(alone, together[query * width..][..width]);
                assert_eq!(alone, together[(keys + query) * width..][..width]);
            }
        }
    }

    /// A prompt of many thousands of tokens would be computed to its end although nobody waits for it.
    #[test]
    fn what_is_not_wanted_is_left_undone() {
        let (heads, d_kv, keys) = (2, 16, 20 * QUERIES_PER_TASK);
        let width = heads * d_kv;
        let fused = values(keys * 3 * width, 3);
        let part = |part| rows(&fused, 3 * width, part * width);
        let (queries, key_rows, first_position) = (part(0), keys, 0);
        let sequence = Sequence { query_rows: keys, first_position, key_rows, queries, keys: part(1), values: part(2) };
        let attention = of_t5(heads, d_kv, false);
        let asked = AtomicUsize::new(0);
        let is_wanted = || asked.fetch_add(1, Ordering::Relaxed) < 4;
        let mut out = vec![0.0; keys * width];
        let run = attention.run(&[sequence], &mut out, StillWanted::while_true(&is_wanted));
        assert_eq!(run, Err(GivenUp));
        // The first time before all, then before each piece.
        let computed = out.chunks(QUERIES_PER_TASK * width).filter(|piece| piece.iter().any(|&value| value != 0.0));
        assert_eq!(computed.count(), 3);
    }
}
