//! Attention of one query: of a decoding step, which reads every key and value of its sequence once, and does little with
//! each. So they are read as they lie, row after row, by all heads, and not head by head: of a head a row has some bytes, and
//! the next row's lie a page away.
//!
//! Scores and sums have the terms and the order that a query among others has.

use std::ops::Range;

use super::{Attention, Sequence, products};
use crate::lanes::{Kernel, LANES, LINE_BYTES, Lanes};

/// Values of so many keys are added before the next heads' are: their lines stay in the first-level cache, where rows that
/// lie a power of two apart have few places.
const KEYS_AT_ONCE: usize = 8;

/// Rows are asked for so many before they are used.
const KEYS_AHEAD: usize = 8;
/// Floats of what memory is read by.
const LINE: usize = LINE_BYTES / size_of::<f32>();

/// Some heads of one query.
pub(super) struct OneQuery<'a, 's> {
    pub(super) attention: &'a Attention<'a>,
    pub(super) sequence: &'a Sequence<'s>,
    /// Which row of the sequence's.
    pub(super) query: usize,
    /// Heads of keys and values.
    pub(super) kv_heads: Range<usize>,
    /// (heads that share those, d_kv)
    pub(super) out: &'a mut [f32],
    /// (heads that share those, keys in whole vectors)
    pub(super) scores: *mut f32,
}

impl Kernel for OneQuery<'_, '_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<L: Lanes>(self) {
        // SAFETY: `Sequence::check` saw that all rows are there. The tiles fit the registers.
        unsafe {
            match L::TILE_ROWS {
                4 => self.attend::<L, 4, 4, 8, 4>(),
                2 => self.attend::<L, 2, 2, 4, 2>(),
                _ => self.attend::<L, 1, 1, 4, 1>(),
            }
        }
    }
}

impl OneQuery<'_, '_> {
    /// R heads that share keys and values at a time, with C keys or V vectors of values; a head by itself with `C1` keys.
    #[inline(always)]
    unsafe fn attend<L: Lanes, const R: usize, const C: usize, const C1: usize, const V: usize>(mut self) {
        let position = self.sequence.first_position + self.query;
        let keys = if self.attention.causal { position + 1 } else { self.sequence.key_rows };
        let stride = keys.next_multiple_of(LANES);
        let group = self.attention.heads / self.attention.kv_heads;
        // SAFETY: all pointers are to rows and heads that exist.
        unsafe {
            if group.is_multiple_of(R) && group > 1 {
                self.scores::<L, R, C>(keys, stride);
            } else {
                self.scores::<L, 1, C1>(keys, stride);
            }
            for head in 0..self.kv_heads.len() * group {
                let scores = std::slice::from_raw_parts_mut(self.scores.add(head * stride), stride);
                self.attention.weigh(self.kv_heads.start * group + head, position, keys, scores);
            }
            if group.is_multiple_of(R) && group > 1 {
                self.sums::<L, R, V>(keys, stride);
            } else {
                self.sums::<L, 1, 4>(keys, stride);
            }
        }
    }

    /// The scores of all heads with the keys, C at a time.
    #[inline(always)]
    unsafe fn scores<L: Lanes, const R: usize, const C: usize>(&self, keys: usize, stride: usize) {
        let mut key = 0;
        // SAFETY: the caller's.
        unsafe {
            while key + C <= keys {
                for c in 0..C {
                    self.prefetch::<L>(key + c + KEYS_AHEAD);
                }
                self.scores_at::<L, R, C>(key, stride);
                key += C;
            }
            while key < keys {
                self.scores_at::<L, R, 1>(key, stride);
                key += 1;
            }
        }
    }

    /// Asks for a row of keys and of values, which need not be there.
    #[inline(always)]
    unsafe fn prefetch<L: Lanes>(&self, row: usize) {
        let d_kv = self.attention.d_kv;
        let (from, lines) = (self.kv_heads.start * d_kv, (self.kv_heads.len() * d_kv).div_ceil(LINE));
        for rows in [self.sequence.keys, self.sequence.values] {
            let first = rows.values.as_ptr().wrapping_add(row * rows.stride + rows.offset + from);
            for line in 0..lines {
                // SAFETY: the caller's machine.
                unsafe { L::prefetch_line(first.wrapping_add(line * LINE).cast()) };
            }
        }
    }

    #[inline(always)]
    unsafe fn scores_at<L: Lanes, const R: usize, const C: usize>(&self, key: usize, stride: usize) {
        let Attention { d_kv, heads, kv_heads, .. } = *self.attention;
        let (group, sequence) = (heads / kv_heads, self.sequence);
        for kv_head in self.kv_heads.clone() {
            for head in (kv_head * group..(kv_head + 1) * group).step_by(R) {
                // SAFETY: the caller's.
                unsafe {
                    let queries = std::array::from_fn(|r| sequence.queries.head(self.query, (head + r) * d_kv));
                    let scores = self.scores.add((head - self.kv_heads.start * group) * stride);
                    products::dots::<L, R, C>(queries, sequence.keys, key, kv_head * d_kv, d_kv, scores, stride);
                }
            }
        }
    }

    /// The values, each weighted by its head's scores, in `out`.
    #[inline(always)]
    unsafe fn sums<L: Lanes, const R: usize, const V: usize>(&mut self, keys: usize, stride: usize) {
        let Attention { d_kv, heads, kv_heads, .. } = *self.attention;
        let (group, values) = (heads / kv_heads, self.sequence.values);
        for first in (0..keys).step_by(KEYS_AT_ONCE) {
            let keys = first..keys.min(first + KEYS_AT_ONCE);
            for kv_head in self.kv_heads.clone() {
                let heads = (kv_head - self.kv_heads.start) * group;
                for head in (heads..heads + group).step_by(R) {
                    // SAFETY: the caller's.
                    unsafe {
                        let scores = self.scores.add(head * stride);
                        let out = self.out.as_mut_ptr().add(head * d_kv);
                        let out = std::array::from_fn(|r| out.add(r * d_kv));
                        let column = kv_head * d_kv;
                        products::weighted_sums::<L, R, V>(scores, stride, keys.clone(), values, column, d_kv, out);
                    }
                }
            }
        }
    }
}
