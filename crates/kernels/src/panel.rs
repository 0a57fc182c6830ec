//! Many rows against the same few: the dot products of `lanes`, sixteen outputs side by side instead of one after
//! another. For attention's scores, whose dot products are so short (`d_kv` is 32 or 64) that the tree which adds
//! their lanes would take longer than they do.
//!
//! Lane l of a dot product takes every 16th input. Here sixteen rows (keys) are turned into a panel first, in which
//! a vector holds one input of all of them: the lanes are then 16 separate passes over the inputs, each a plain
//! multiplication and addition per vector, and the tree is 15 additions for 16 outputs. Same operations on the same
//! numbers in the same order, so the same bits.

use super::lanes::{LANES, Lanes};

/// Lanes l, l + 4, l + 8 and l + 12 are passed over together, in the order in which the tree wants their sums.
const PASSES: [usize; 4] = [0, 2, 1, 3];

/// Turns 16 rows into a panel of 16 k floats: for each pass, for each vector of inputs, for each of its four lanes,
/// the 16 rows. `load(row, at)` gives inputs `at..at + 16` of a row; k is a multiple of 16.
///
/// # Safety
/// `panel` must have room, and `load` must be good for 16 rows of k.
#[inline(always)]
pub(super) unsafe fn turn<L: Lanes>(load: impl Fn(usize, usize) -> L, k: usize, panel: *mut f32) {
    let vectors = k / LANES;
    // SAFETY: the caller's rows and panel.
    unsafe {
        for vector in 0..vectors {
            let mut square = [L::splat(0.0); LANES];
            let mut row = 0;
            while row < LANES {
                square[row] = load(row, vector * LANES);
                row += 1;
            }
            let square = L::transpose(square);
            for pass in 0..PASSES.len() {
                for q in 0..4 {
                    square[PASSES[pass] + q * 4].store(panel.add(((pass * vectors + vector) * 4 + q) * LANES));
                }
            }
        }
    }
}

/// R rows of x (k floats each, `x_stride` from row to row) against a panel: R x 16 outputs, to `out` with `stride`
/// floats from row to row.
/// Sums wait for their sisters in the tree in `waiting` (2 R x 16 floats): in memory by our own hand, since a
/// compiler that is left to choose keeps all four times as many addends there.
///
/// # Safety
/// The pointers must be valid for what is read and written.
#[inline(always)]
pub(super) unsafe fn tile<L: Lanes, const R: usize>(
    x: *const f32,
    x_stride: usize,
    k: usize,
    panel: *const f32,
    waiting: *mut f32,
    out: *mut f32,
    stride: usize,
) {
    // SAFETY: the caller's rows, panel and out.
    unsafe {
        let even = |r: usize| waiting.add(r * LANES);
        let odd = |r: usize| waiting.add((R + r) * LANES);
        pass::<L, R, 0>(x, x_stride, k, panel, |r, sum| sum.store(even(r)));
        pass::<L, R, 1>(x, x_stride, k, panel, |r, sum| L::load(even(r)).add(sum).store(even(r)));
        pass::<L, R, 2>(x, x_stride, k, panel, |r, sum| sum.store(odd(r)));
        pass::<L, R, 3>(x, x_stride, k, panel, |r, sum| {
            L::load(even(r)).add(L::load(odd(r)).add(sum)).store(out.add(r * stride));
        });
    }
}

/// The P-th pass: four lanes of R x 16 dot products, and their sums.
#[inline(always)]
#[allow(clippy::needless_range_loop)] // Iterators would be library calls, which need not inline.
unsafe fn pass<L: Lanes, const R: usize, const P: usize>(
    x: *const f32,
    x_stride: usize,
    k: usize,
    panel: *const f32,
    mut sum: impl FnMut(usize, L),
) {
    // SAFETY: the caller's rows and panel.
    unsafe {
        let mut sums = [[L::splat(0.0); 4]; R];
        let vectors = k / LANES;
        let mut keys = panel.add(P * vectors * 4 * LANES);
        let mut x = x.add(PASSES[P]);
        for _ in 0..vectors {
            for q in 0..4 {
                let key = L::load(keys.add(q * LANES));
                for r in 0..R {
                    sums[r][q] = sums[r][q].fma(L::splat(*x.add(r * x_stride + q * 4)), key);
                }
            }
            keys = keys.add(4 * LANES);
            x = x.add(LANES);
        }
        for r in 0..R {
            let [s0, s4, s8, s12] = sums[r];
            sum(r, s0.add(s8).add(s4.add(s12)));
        }
    }
}
