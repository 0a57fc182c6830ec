//! What attention multiplies by vectors where it reads keys and values as they lie: scores, and sums of values.

#![allow(clippy::needless_range_loop, reason = "a tile is indexed by row and column")]

use std::ops::Range;

use super::HeadRows;
use crate::lanes::{LANES, Lanes};

/// `scores[r][key + c] = q[r] . k[key + c]`, each in the order of `dot_lanes`.
#[inline(always)]
pub(super) unsafe fn dots<L: Lanes, const R: usize, const C: usize>(
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

/// `out[r] = sum over keys of p[r][key] * v[key]` for `width` columns, in the order of the keys. Where `keys` do not begin with
/// the first, they are added to what those before made.
#[inline(always)]
pub(super) unsafe fn weighted_sums<L: Lanes, const R: usize, const V: usize>(
    probabilities: *const f32,
    stride: usize,
    keys: Range<usize>,
    values: HeadRows<'_>,
    column: usize,
    width: usize,
    out: [*mut f32; R],
) {
    let mut at = 0;
    while at < width {
        let (column, left) = (column + at, width - at);
        let keys = keys.clone();
        // SAFETY: the caller's.
        unsafe {
            let out = out.map(|out| out.add(at));
            if left >= V * LANES {
                weighted_sum::<L, R, V>(probabilities, stride, keys, values, column, left, out);
                at += V * LANES;
            } else if left > LANES {
                weighted_sum::<L, R, 2>(probabilities, stride, keys, values, column, left, out);
                at += 2 * LANES;
            } else {
                weighted_sum::<L, R, 1>(probabilities, stride, keys, values, column, left, out);
                at += LANES;
            }
        }
    }
}

/// V vectors of it, of which the last ends with the columns that are `left`.
#[inline(always)]
unsafe fn weighted_sum<L: Lanes, const R: usize, const V: usize>(
    probabilities: *const f32,
    stride: usize,
    keys: Range<usize>,
    values: HeadRows<'_>,
    column: usize,
    left: usize,
    out: [*mut f32; R],
) {
    // SAFETY: `probabilities` is (R, stride), and the caller's values and out exist.
    unsafe {
        let mut sums = [[L::splat(0.0); V]; R];
        if keys.start > 0 {
            for r in 0..R {
                for i in 0..V {
                    sums[r][i] = load_up_to(out[r].add(i * LANES), left - i * LANES);
                }
            }
        }
        for key in keys {
            let value = values.head(key, column);
            let v: [L; V] = std::array::from_fn(|i| load_up_to(value.add(i * LANES), left - i * LANES));
            for r in 0..R {
                let p = L::splat(*probabilities.add(r * stride + key));
                for i in 0..V {
                    sums[r][i] = sums[r][i].fma(p, v[i]);
                }
            }
        }
        for r in 0..R {
            for i in 0..V {
                store_up_to(sums[r][i], out[r].add(i * LANES), left - i * LANES);
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

/// Writes 16 floats, or the `left` that there is room for.
#[inline(always)]
unsafe fn store_up_to<L: Lanes>(vector: L, to: *mut f32, left: usize) {
    // SAFETY: the caller has room for `left` floats.
    unsafe {
        if left >= LANES {
            return vector.store(to);
        }
        let mut lanes = [0.0; LANES];
        vector.store(lanes.as_mut_ptr());
        std::ptr::copy_nonoverlapping(lanes.as_ptr(), to, left);
    }
}
