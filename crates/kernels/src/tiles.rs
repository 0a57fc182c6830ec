//! Some rows of W against some rows of x, a tile of R x C dot products at a time: their sums stay in registers, and each
//! vector that is read serves several of them. Each is summed in the order of [`super::lanes::dot_lanes`].

use super::{
    lanes::{self, LANES, Lanes},
    stored_rows::StoredRows,
};
use crate::dtype::StoredDType;

/// Rows of x.
#[derive(Clone, Copy)]
pub(super) struct X {
    pub(super) first: *const f32,
    /// Floats from row to row.
    pub(super) stride: usize,
    pub(super) rows: usize,
}

/// Where results go: a row of x has a row, a row of W a column.
#[derive(Clone, Copy)]
pub(super) struct Out {
    pub(super) first: *mut f32,
    /// Floats from row to row.
    pub(super) stride: usize,
}

/// Rows of W, one after another.
#[derive(Clone, Copy)]
pub(super) struct Rows<W> {
    pub(super) stored: W,
    pub(super) first: *const u8,
    /// Values of a row. Whole vectors, or blocks, but for float32.
    pub(super) k: usize,
}

impl<W: StoredRows> Rows<W> {
    /// `columns` of these rows, at most C, against all of x; those that do not fill a tile go one by one. `soon` are bytes
    /// that will be asked for next.
    ///
    /// # Safety
    /// All rows must be there and hold k values, `out` must have room, and the machine must have what `L` needs.
    #[inline(always)]
    pub(super) unsafe fn against_all<L: Lanes, const R: usize, const C: usize>(
        self,
        columns: usize,
        x: X,
        out: Out,
        soon: &[u8],
    ) {
        // SAFETY: the caller's.
        unsafe {
            if columns == C {
                return self.row_tiles::<L, R, C>(x, out, soon);
            }
            let mut column = 0;
            while column < columns {
                let one = Rows { first: self.first.add(column * W::DTYPE.bytes(self.k)), ..self };
                one.row_tiles::<L, R, 1>(x, Out { first: out.first.add(column), ..out }, soon);
                column += 1;
            }
        }
    }

    /// All tiles of C columns; the last one has as many rows as are left, at most 3.
    #[inline(always)]
    unsafe fn row_tiles<L: Lanes, const R: usize, const C: usize>(self, x: X, out: Out, mut soon: &[u8]) {
        // A few lines with each tile: all at once they would wait for each other.
        let share = soon.len().div_ceil((x.rows / R).max(1));
        let mut row = 0;
        // SAFETY: the caller's.
        unsafe {
            while row + R <= x.rows {
                let (now, later) = soon.split_at(share.min(soon.len()));
                L::prefetch(now);
                soon = later;
                self.tile::<L, R, C>(x, out, row);
                row += R;
            }
            L::prefetch(soon);
            match x.rows - row {
                3 => self.tile::<L, 3, C>(x, out, row),
                2 => self.tile::<L, 2, C>(x, out, row),
                1 => self.tile::<L, 1, C>(x, out, row),
                _ => {}
            }
        }
    }

    /// R x C dot products.
    #[inline(always)]
    #[allow(clippy::needless_range_loop)] // Iterators would be library calls, which need not inline.
    unsafe fn tile<L: Lanes, const R: usize, const C: usize>(self, x: X, out: Out, row: usize) {
        let Self { stored, first: w, k } = self;
        let row_bytes = W::DTYPE.bytes(k);
        // SAFETY: the caller's.
        unsafe {
            let (x, x_stride) = (x.first.add(row * x.stride), x.stride);
            let mut sums = [[L::splat(0.0); C]; R];
            let whole = k / LANES * LANES;
            let mut at = 0;
            while at < whole {
                let mut factors = [stored.factors::<L>(w, at); C];
                let mut c = 1;
                while c < C {
                    factors[c] = stored.factors::<L>(w.add(c * row_bytes), at);
                    c += 1;
                }
                let end = at + W::SHARING;
                while at < end {
                    if !W::IS_NEAR {
                        // What is read out of memory: the next tile's values, as many as these.
                        let soon = w.wrapping_add(C * (row_bytes + W::bytes(at)));
                        let mut line = 0;
                        while line < C * W::bytes(W::VECTORS * LANES) {
                            L::prefetch_line(soon.wrapping_add(line));
                            line += lanes::LINE_BYTES;
                        }
                    }
                    for c in 0..C {
                        let wc = stored.load::<L>(w.add(c * row_bytes), at, &factors[c]);
                        let mut v = 0;
                        while v < W::VECTORS {
                            for r in 0..R {
                                let xr = L::load(x.add(r * x_stride + at + v * LANES));
                                sums[r][c] = sums[r][c].fma(xr, wc[v]);
                            }
                            v += 1;
                        }
                    }
                    at += W::VECTORS * LANES;
                }
            }
            if W::DTYPE == StoredDType::F32 && whole < k {
                let mut xs = [L::splat(0.0); R];
                for r in 0..R {
                    xs[r] = L::load_partial(x.add(r * x_stride + whole), k - whole);
                }
                for c in 0..C {
                    let wc = L::load_partial(w.add(c * row_bytes).cast::<f32>().add(whole), k - whole);
                    for r in 0..R {
                        sums[r][c] = sums[r][c].fma(xs[r], wc);
                    }
                }
            }
            let sums = L::sums(sums);
            for r in 0..R {
                out.first.add((row + r) * out.stride).cast::<[f32; C]>().write(sums[r]);
            }
        }
    }
}
