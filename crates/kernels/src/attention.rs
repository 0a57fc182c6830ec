//! Attention on rows: scores with a factor and a bias per distance, where there are, and softmax over the keys a query may see.
//! One function serves the encoder, the decoder's self-attention over its cache, and cross-attention: they
//! differ in where keys and values lie.
//!
//! Invariant: a query's output depends on its own row and its own sequence's keys and values, in the order
//! of the keys; neither tiles nor threads nor other sequences change a bit.

#![allow(clippy::needless_range_loop, reason = "a tile is indexed by row and column")]

mod one_query;
mod products;

use std::cell::RefCell;

use rayon::prelude::*;

use self::{
    one_query::OneQuery,
    products::{dots, weighted_sums},
};
use crate::{
    lanes::{self, Kernel, LANES, Lanes},
    norm::softmax_row,
    panel,
    position_bias::PositionBias,
    still_wanted::{GivenUp, StillWanted},
};

/// Less than this runs on the calling thread: waking another costs more than it saves.
const PARALLEL_MACS_MIN: usize = 400_000;
/// Queries per piece of parallel work; before each it is asked whether anybody still waits.
pub const QUERIES_PER_TASK: usize = 48;
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
    /// Scores of the queries of a tile, or of the heads of one query: rows of whole vectors of keys.
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

    /// Makes shares of a head's scores with the first `keys` keys, for the query at `position`: `softmax(scale * score + bias)`.
    /// In whole vectors: what is beyond the last key, or is not seen, counts nothing, and adds nothing.
    #[inline(always)]
    fn weigh(&self, head: usize, position: usize, keys: usize, scores: &mut [f32]) {
        let seen = if self.causal { position + 1 } else { keys };
        scores[seen..].fill(f32::NEG_INFINITY);
        if self.scale != 1.0 {
            scores.iter_mut().for_each(|score| *score *= self.scale);
        }
        if let Some(bias) = self.bias {
            bias.add_to(head, position, scores);
        }
        if let Some(window) = self.window.filter(|_| self.causal) {
            scores[..seen.saturating_sub(window)].fill(f32::NEG_INFINITY);
        }
        softmax_row(scores);
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
        let threads = if macs >= PARALLEL_MACS_MIN { rayon::current_num_threads() } else { 1 };
        // Where there are fewer queries than threads, these share the heads of each.
        let kv_heads = self.kv_heads.div_ceil(threads.div_ceil(rows.max(1)));
        let mut tasks = Vec::new();
        let mut rest = out;
        for sequence in sequences {
            sequence.check(self);
            let own = rest.split_off_mut(..sequence.query_rows * width).expect("out holds every query row");
            match sequence.query_rows {
                _ if threads == 1 => self.queries(sequence, 0, own),
                1 => {
                    let shares = own.chunks_mut(kv_heads * width / self.kv_heads).enumerate();
                    let task = |(share, out)| Task { sequence, query: 0, kv_head: share * kv_heads, out };
                    tasks.extend(shares.map(task));
                }
                _ => {
                    let pieces = own.chunks_mut(QUERIES_PER_TASK * width).enumerate();
                    let task = |(piece, out)| Task { sequence, query: piece * QUERIES_PER_TASK, kv_head: 0, out };
                    tasks.extend(pieces.map(task));
                }
            }
        }
        tasks.into_par_iter().try_for_each(|Task { sequence, query, kv_head, out }| {
            still_wanted.check()?;
            match sequence.query_rows {
                1 => self.heads_of(sequence, query, kv_head, out),
                _ => self.queries(sequence, query, out),
            }
            Ok(())
        })
    }

    /// The queries from `first_query` on that `out` has rows for.
    fn queries(&self, sequence: &Sequence<'_>, first_query: usize, out: &mut [f32]) {
        if out.len() == self.heads * self.d_kv {
            return self.heads_of(sequence, first_query, 0, out);
        }
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

    /// Heads of one query, those from the first of `kv_head` on that `out` has room for.
    fn heads_of(&self, sequence: &Sequence<'_>, query: usize, kv_head: usize, out: &mut [f32]) {
        if sequence.key_rows == 0 {
            out.fill(0.0);
            return;
        }
        ROOM.with_borrow_mut(|room| {
            let heads = out.len() / self.d_kv;
            let kv_heads = kv_head..kv_head + heads * self.kv_heads / self.heads;
            let scores = aligned(&mut room.scores, heads * sequence.key_rows.next_multiple_of(LANES));
            lanes::run(OneQuery { attention: self, sequence, query, kv_heads, out, scores });
        });
    }
}

/// What a thread does at a time.
struct Task<'a, 's> {
    sequence: &'a Sequence<'s>,
    /// The first query.
    query: usize,
    /// The first head of keys, where the heads of one query are shared out.
    kv_head: usize,
    out: &'a mut [f32],
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
        let turned = d_kv.is_multiple_of(LANES);
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
        let Attention { d_kv, heads, causal, .. } = *self.attention;
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
                self.attention.weigh(head, position + r, keys, scores);
            }
            let out = std::array::from_fn(|r| self.out.as_mut_ptr().add(((row + r) * heads + head) * d_kv));
            weighted_sums::<L, R, 2>(scores, stride, 0..keys, self.sequence.values, kv_column, d_kv, out);
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

/// `len` floats of a buffer from a cache line's beginning on.
fn aligned(buffer: &mut Vec<f32>, len: usize) -> *mut f32 {
    const LINE: usize = 64;
    buffer.resize(buffer.len().max(len + LINE / size_of::<f32>()), 0.0);
    let start = buffer.as_mut_ptr();
    // SAFETY: the buffer is a line longer than `len`.
    unsafe { start.add(start.align_offset(LINE).min(LINE / size_of::<f32>())) }
}
