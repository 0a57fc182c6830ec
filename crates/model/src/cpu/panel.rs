//! Many rows against the same W: the same dot products as in `lanes`, sixteen outputs side by side instead of
//! one after another.
//!
//! Lane l of a dot product takes every 16th input; in the end the lanes are added as a tree. Done for one output
//! at a time, that tree costs as much as a dot product of 128 inputs. Here W is turned into a panel first, in
//! which a vector holds one input of 16 outputs: the lanes are then 16 separate passes over the inputs, each a
//! plain multiplication and addition per vector, and the tree is 15 additions for 16 outputs. Same operations
//! on the same numbers in the same order, so the same bits.

use super::lanes::{LANES, Lanes};

/// A panel's share of the second-level cache, in floats, beside the rows of x.
const BLOCK_FLOATS: usize = 48 << 10;
/// Lanes l, l + 4, l + 8 and l + 12 are passed over together, in the order in which the tree wants their sums.
const PASSES: [usize; 4] = [0, 2, 1, 3];

/// Whether turning W of rows of `k` pays for `n` rows: it costs something per input, and what it saves of each row
/// is the tree, whose cost does not grow with the inputs. Measured with AVX-512.
pub(super) fn pays(n: usize, k: usize) -> bool {
    n * 12 >= k
}

/// Columns to turn at a time: whole panels of `width`.
pub(super) fn block_columns(k: usize, width: usize) -> usize {
    (BLOCK_FLOATS / k / width).max(1) * width
}

/// Turns 16 C rows of W into a panel of k * 16 C floats: for each pass, for each vector of inputs, for both of its
/// lanes, the 16 C outputs. `load(c, at)` gives inputs `at..at + 16` of row c; k is a multiple of 16.
///
/// # Safety
/// `panel` must have room, and `load` must be good for 16 C rows of k.
#[inline(always)]
pub(super) unsafe fn turn<L: Lanes, const C: usize>(load: impl Fn(usize, usize) -> L, k: usize, panel: *mut f32) {
    let vectors = k / LANES;
    // SAFETY: the caller's rows and panel.
    unsafe {
        for vector in 0..vectors {
            for c in 0..C {
                let mut square = [L::splat(0.0); LANES];
                let mut row = 0;
                while row < LANES {
                    square[row] = load(c * LANES + row, vector * LANES);
                    row += 1;
                }
                let square = L::transpose(square);
                for pass in 0..PASSES.len() {
                    for q in 0..4 {
                        square[PASSES[pass] + q * 4]
                            .store(panel.add((((pass * vectors + vector) * 4 + q) * C + c) * LANES));
                    }
                }
            }
        }
    }
}

/// R rows of x (k floats each, `x_stride` from row to row) against a panel: R x 16 C outputs, to `out` with `stride` floats from row to row.
/// Sums wait for their sisters in the tree in `waiting` (2 R x 16 C floats): in memory by our own hand, since a
/// compiler that is left to choose keeps all four times as many addends there.
///
/// # Safety
/// The pointers must be valid for what is read and written.
#[inline(always)]
pub(super) unsafe fn tile<L: Lanes, const R: usize, const C: usize>(
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
        let even = |r: usize, c: usize| waiting.add((r * C + c) * LANES);
        let odd = |r: usize, c: usize| waiting.add(((R + r) * C + c) * LANES);
        pass::<L, R, C, 0>(x, x_stride, k, panel, |r, c, sum| sum.store(even(r, c)));
        pass::<L, R, C, 1>(x, x_stride, k, panel, |r, c, sum| L::load(even(r, c)).add(sum).store(even(r, c)));
        pass::<L, R, C, 2>(x, x_stride, k, panel, |r, c, sum| sum.store(odd(r, c)));
        pass::<L, R, C, 3>(x, x_stride, k, panel, |r, c, sum| {
            L::load(even(r, c)).add(L::load(odd(r, c)).add(sum)).store(out.add(r * stride + c * LANES));
        });
    }
}

/// The P-th pass: four lanes of R x 16 C dot products, and their sums.
#[inline(always)]
#[allow(clippy::needless_range_loop)] // As above.
unsafe fn pass<L: Lanes, const R: usize, const C: usize, const P: usize>(
    x: *const f32,
    x_stride: usize,
    k: usize,
    panel: *const f32,
    mut sum: impl FnMut(usize, usize, L),
) {
    // SAFETY: the caller's rows and panel.
    unsafe {
        let zero = [[[L::splat(0.0); 4]; C]; R];
        let mut sums = zero;
        let vectors = k / LANES;
        let mut w = panel.add(P * vectors * 4 * C * LANES);
        let mut x = x.add(PASSES[P]);
        for _ in 0..vectors {
            for q in 0..4 {
                let mut ws = [L::splat(0.0); C];
                for c in 0..C {
                    ws[c] = L::load(w.add((q * C + c) * LANES));
                }
                for r in 0..R {
                    let x = L::splat(*x.add(r * x_stride + q * 4));
                    for c in 0..C {
                        sums[r][c][q] = sums[r][c][q].fma(x, ws[c]);
                    }
                }
            }
            w = w.add(4 * C * LANES);
            x = x.add(LANES);
        }
        for r in 0..R {
            for c in 0..C {
                let [s0, s4, s8, s12] = sums[r][c];
                sum(r, c, s0.add(s8).add(s4.add(s12)));
            }
        }
    }
}
