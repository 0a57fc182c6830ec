//! What attention multiplies by vectors where it reads keys and values as they lie: scores, and sums of values.

#![allow(clippy::needless_range_loop, reason = "a tile is indexed by row and column")]

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

/// `out[r] = sum over keys of p[r][key] * v[key]` in the order of the keys, for V vectors of which the last
/// ends at `width` columns if those are fewer.
#[inline(always)]
pub(super) unsafe fn weighted_sum<L: Lanes, const R: usize, const V: usize>(
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
