//! `out = x W^T` with W as checkpoints store it: row-major (out, in), in float32, bfloat16, float16 or blocks.
//!
//! Libraries pack W, choose a kernel by the number of rows, and so change a row's bits with its company; and
//! they read bf16 slower than f32 on a CPU. Here every output element is one dot product in one fixed order
//! (see `lanes`), W is used where it lies, so making an expert resident is a copy and nothing else, and it is
//! widened to f32 a few rows at a time on its way through the first-level cache. With few rows the product
//! is bound by reading W, and bf16 halves that, blocks of 4 bits take a seventh.
//!
//! Called by `Linear` for the backbone, by `ExpertShape` for experts, and by the predictor nets.

use std::{cell::RefCell, mem::MaybeUninit, ops::Range};

use half::f16;
use rayon::prelude::*;

use super::{
    lanes::{self, Kernel, Lanes},
    stored_rows::{Bf16, F32, Q4, Q8, StoredRows, widen_blocks},
};
use crate::dtype::StoredDType;

/// Rows of x per pass over W, so that they stay in the second-level cache: so many where rows are long, and as many
/// as are so many floats where they are short.
const ROW_BLOCK: usize = 48;
const ROW_BLOCK_FLOATS: usize = 16 << 10;
/// Products with fewer multiplications and less to read run on the calling thread: waking another costs
/// more than it saves.
const PARALLEL_MACS_MIN: usize = 2_000_000;
const PARALLEL_BYTES_MIN: usize = 4 << 20;
/// Pieces for threads are multiples of this, so that few tiles are cut.
const COLUMNS_PER_PIECE: usize = 32;
/// Rows of W that are widened at once: the most columns a tile has.
const WIDENED_ROWS_MAX: usize = 4;

/// A weight matrix where it lies.
#[derive(Clone, Copy, Debug)]
pub struct MatrixRef<'a> {
    /// (rows, cols) values in `dtype`, row-major, little-endian. Any alignment; a row is whole blocks.
    pub bytes: &'a [u8],
    /// How a value is stored.
    pub dtype: StoredDType,
    /// Outputs.
    pub rows: usize,
    /// Inputs.
    pub cols: usize,
}

/// `out = x W^T`: x (n, cols) -> (n, rows), in memory that is kept from call to call. See [`matmul`].
pub fn product_into(x: &[f32], w: MatrixRef<'_>, out: &mut Vec<f32>) {
    let len = x.len().checked_div(w.cols).unwrap_or(0) * w.rows;
    out.clear();
    out.reserve(len);
    write_product(x, w, &mut out.spare_capacity_mut()[..len]);
    // SAFETY: `write_product` filled them.
    unsafe { out.set_len(len) };
}

/// `out = x W^T`: x (n, cols), out (n, rows). Splits over the threads of the current rayon pool when there
/// is enough to do.
///
/// Panics when the lengths do not fit: shapes are checked where weights are loaded.
pub fn matmul(x: &[f32], w: MatrixRef<'_>, out: &mut [f32]) {
    // SAFETY: floats that were written stay written.
    write_product(x, w, unsafe { std::mem::transmute::<&mut [f32], &mut [MaybeUninit<f32>]>(out) });
}

/// [`matmul`] into memory that holds nothing yet; writes every element of `out`.
fn write_product(x: &[f32], w: MatrixRef<'_>, out: &mut [MaybeUninit<f32>]) {
    if w.cols == 0 || w.rows == 0 || x.is_empty() {
        out.fill(MaybeUninit::new(0.0));
        return;
    }
    let n = x.len() / w.cols;
    assert_eq!(x.len(), n * w.cols, "x is (n, {})", w.cols);
    assert_eq!(out.len(), n * w.rows, "out is ({n}, {})", w.rows);
    assert_eq!(w.bytes.len(), w.dtype.bytes(w.rows * w.cols), "W is ({}, {}) {:?}", w.rows, w.cols, w.dtype);
    let out = OutPointer(out.as_mut_ptr().cast());
    let small = n * w.rows * w.cols < PARALLEL_MACS_MIN && w.bytes.len() < PARALLEL_BYTES_MIN;
    let threads = if small { 1 } else { rayon::current_num_threads() };
    if threads == 1 {
        return columns(x, n, w, 0..w.rows, out);
    }
    let share = w.rows.div_ceil(threads).next_multiple_of(COLUMNS_PER_PIECE);
    (0..w.rows.div_ceil(share)).into_par_iter().for_each(|piece| {
        columns(x, n, w, piece * share..w.rows.min((piece + 1) * share), out);
    });
}

fn columns(x: &[f32], n: usize, w: MatrixRef<'_>, columns: Range<usize>, out: OutPointer) {
    ROOM.with_borrow_mut(|widened| lanes::run(Columns { x, n, w, columns, out, widened }));
}

/// Where results go. Pieces write disjoint columns of it.
#[derive(Clone, Copy)]
struct OutPointer(*mut f32);

// SAFETY: each piece writes only its own columns, and `matmul` holds the one `&mut` until all are done.
unsafe impl Send for OutPointer {}
// SAFETY: as above.
unsafe impl Sync for OutPointer {}

/// Some output columns (rows of W) of a product.
struct Columns<'a> {
    x: &'a [f32],
    n: usize,
    w: MatrixRef<'a>,
    columns: Range<usize>,
    out: OutPointer,
    widened: &'a mut Vec<f32>,
}

impl Kernel for Columns<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<L: Lanes>(mut self) {
        // SAFETY: `matmul` checked the lengths. The tile sizes are those whose accumulators fit the registers.
        unsafe {
            match L::TILE_ROWS {
                4 => self.blocks::<L, 4, 4>(),
                2 => self.blocks::<L, 2, 3>(),
                _ => self.blocks::<L, 1, 4>(),
            }
        }
    }
}

thread_local! {
    /// A thread's room for at least [`WIDENED_ROWS_MAX`] rows of W, widened.
    static ROOM: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

impl Columns<'_> {
    #[inline(always)]
    unsafe fn blocks<L: Lanes, const R: usize, const C: usize>(&mut self) {
        // With few rows of x, widening ahead would cost as much as the product: widen on the way instead.
        if self.columns.is_empty() {
            return;
        }
        self.widened.resize(self.widened.len().max(WIDENED_ROWS_MAX * self.w.cols), 0.0);
        let straight = self.n <= R;
        // Blocks of about one size: a last one of a row or two would cost as much reading of W as a whole one.
        let blocks = self.n.div_ceil(ROW_BLOCK.max(ROW_BLOCK_FLOATS / self.w.cols));
        let row_block = self.n.div_ceil(blocks).next_multiple_of(R);
        let mut block = 0;
        while block < self.n {
            let rows = block..self.n.min(block + row_block);
            let mut column = self.columns.start;
            while column < self.columns.end {
                let columns = C.min(self.columns.end - column);
                // SAFETY: the widened or stored rows of W hold k values each, x and out as `matmul` checked.
                unsafe {
                    let stored = self.stored(column, columns).as_ptr();
                    match self.w.dtype {
                        StoredDType::BF16 if straight && self.w.cols.is_multiple_of(lanes::LANES) => {
                            self.column_tiles::<L, Bf16, R, C>(rows.clone(), column, columns, stored, &[]);
                        }
                        StoredDType::Q8_0 if straight => {
                            self.column_tiles::<L, Q8, R, C>(rows.clone(), column, columns, stored, &[]);
                        }
                        StoredDType::Q4_0 if straight => {
                            self.column_tiles::<L, Q4, R, C>(rows.clone(), column, columns, stored, &[]);
                        }
                        _ => {
                            let w = self.widen::<L>(column, columns);
                            let soon = self.stored(column + C, C);
                            self.column_tiles::<L, F32, R, C>(rows.clone(), column, columns, w, soon);
                        }
                    }
                }
                column += C;
            }
            block += row_block;
        }
    }

    /// The bytes of `columns` rows of W from `column` on, as far as they are ours.
    #[inline(always)]
    fn stored(&self, column: usize, columns: usize) -> &[u8] {
        let row_bytes = self.w.dtype.bytes(self.w.cols);
        let (from, to) = (column.min(self.columns.end), (column + columns).min(self.columns.end));
        &self.w.bytes[from * row_bytes..to * row_bytes]
    }

    /// `columns` rows of W from `column` on as float32.
    #[inline(always)]
    unsafe fn widen<L: Lanes>(&mut self, column: usize, columns: usize) -> *const u8 {
        let (k, row_bytes) = (self.w.cols, self.w.dtype.bytes(self.w.cols));
        let bytes = &self.w.bytes[column * row_bytes..(column + columns) * row_bytes];
        let widened = &mut self.widened[..columns * k];
        match self.w.dtype {
            StoredDType::F32 => return bytes.as_ptr(),
            StoredDType::BF16 => {
                for (wide, narrow) in widened.iter_mut().zip(bytes.chunks_exact(2)) {
                    *wide = f32::from_bits(u32::from(u16::from_le_bytes([narrow[0], narrow[1]])) << 16);
                }
            }
            StoredDType::F16 => {
                for (wide, narrow) in widened.iter_mut().zip(bytes.chunks_exact(2)) {
                    *wide = f16::from_le_bytes([narrow[0], narrow[1]]).to_f32();
                }
            }
            // SAFETY: rows are whole blocks, one after another.
            StoredDType::Q8_0 => unsafe { widen_blocks::<L, Q8>(bytes, widened) },
            // SAFETY: as above.
            StoredDType::Q4_0 => unsafe { widen_blocks::<L, Q4>(bytes, widened) },
        }
        widened.as_ptr().cast()
    }

    /// All tiles of some rows and `columns` columns; columns that do not fill a tile go one by one.
    #[inline(always)]
    unsafe fn column_tiles<L: Lanes, W: StoredRows, const R: usize, const C: usize>(
        &self,
        rows: Range<usize>,
        column: usize,
        columns: usize,
        w: *const u8,
        soon: &[u8],
    ) {
        // SAFETY: rows and columns are within x, `w` and out.
        unsafe {
            if columns == C {
                return self.row_tiles::<L, W, R, C>(rows, column, w, soon);
            }
            let mut last = 0;
            while last < columns {
                self.row_tiles::<L, W, R, 1>(
                    rows.clone(),
                    column + last,
                    w.add(last * W::row_bytes(self.w.cols)),
                    soon,
                );
                last += 1;
            }
        }
    }

    /// All tiles of some rows and C columns; the last one has as many rows as are left, at most 3.
    #[inline(always)]
    unsafe fn row_tiles<L: Lanes, W: StoredRows, const R: usize, const C: usize>(
        &self,
        rows: Range<usize>,
        column: usize,
        w: *const u8,
        mut soon: &[u8],
    ) {
        let mut row = rows.start;
        // A few lines with each tile: all at once they would wait for each other.
        let share = soon.len().div_ceil((rows.len() / R).max(1));
        // SAFETY: rows and columns are within x, `w` and out.
        unsafe {
            while row + R <= rows.end {
                let (now, later) = soon.split_at(share.min(soon.len()));
                L::prefetch(now);
                soon = later;
                self.tile::<L, W, R, C>(row, column, w);
                row += R;
            }
            L::prefetch(soon);
            match rows.end - row {
                3 => self.tile::<L, W, 3, C>(row, column, w),
                2 => self.tile::<L, W, 2, C>(row, column, w),
                1 => self.tile::<L, W, 1, C>(row, column, w),
                _ => {}
            }
        }
    }

    /// R x C dot products at once, each in the order of `dot_lanes`.
    #[inline(always)]
    #[allow(clippy::needless_range_loop)] // Iterators would be library calls, which need not inline.
    unsafe fn tile<L: Lanes, W: StoredRows, const R: usize, const C: usize>(
        &self,
        row: usize,
        column: usize,
        w: *const u8,
    ) {
        let (k, row_bytes) = (self.w.cols, W::row_bytes(self.w.cols));
        // SAFETY: R rows of x and C rows of `w` hold k values each; out holds (n, W rows).
        unsafe {
            let x = self.x.as_ptr().add(row * k);
            let mut sums = [[L::splat(0.0); C]; R];
            let whole = k / lanes::LANES * lanes::LANES;
            let mut at = 0;
            while at < whole {
                let mut ws = [[L::splat(0.0); 2]; C];
                for c in 0..C {
                    ws[c] = W::load::<L>(w.add(c * row_bytes), at);
                }
                let mut v = 0;
                while v < W::VECTORS {
                    for r in 0..R {
                        let xr = L::load(x.add(r * k + at + v * lanes::LANES));
                        for c in 0..C {
                            sums[r][c] = sums[r][c].fma(xr, ws[c][v]);
                        }
                    }
                    v += 1;
                }
                at += W::VECTORS * lanes::LANES;
            }
            if W::VECTORS == 1 && whole < k {
                // Only of float32: other rows that do not fill vectors are widened first.
                let mut xs = [L::splat(0.0); R];
                for r in 0..R {
                    xs[r] = L::load_partial(x.add(r * k + whole), k - whole);
                }
                for c in 0..C {
                    let wc = L::load_partial(w.add(c * row_bytes).cast::<f32>().add(whole), k - whole);
                    for r in 0..R {
                        sums[r][c] = sums[r][c].fma(xs[r], wc);
                    }
                }
            }
            let out = self.out.0.add(row * self.w.rows + column);
            let sums = L::sums(sums);
            for r in 0..R {
                out.add(r * self.w.rows).cast::<[f32; C]>().write(sums[r]);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use half::bf16;

    use super::*;
    use crate::{blocks, cpu::lanes::dot};

    fn values(n: usize, seed: usize) -> Vec<f32> {
        (0..n).map(|i| ((i * 7919 + seed * 104_729) % 1009) as f32 / 504.0 - 1.0).collect()
    }

    /// The product by vectors of every kind.
    fn by_each_kind(x: &[f32], n: usize, w: MatrixRef<'_>) -> Vec<Vec<f32>> {
        let outs = RefCell::new(vec![]);
        lanes::run_each(|| {
            let mut out = vec![f32::NAN; n * w.rows];
            let (out_at, widened) = (OutPointer(out.as_mut_ptr()), Box::leak(Box::default()));
            outs.borrow_mut().push(out);
            Columns { x, n, w, columns: 0..w.rows, out: out_at, widened }
        });
        outs.into_inner()
    }

    /// A model of blocks would compute something else than its values in float32 would.
    #[test]
    fn blocks_are_their_values() {
        for (n, k, m) in [(1, 32, 1), (1, 64, 301), (2, 96, 7), (3, 128, 40), (4, 32, 65), (9, 256, 33), (70, 64, 50)] {
            for dtype in StoredDType::BLOCKS {
                let (x, bytes) = (values(n * k, 7), blocks::quantized(&values(m * k, 8), dtype).unwrap());
                let wide: Vec<u8> = dtype.widen(&bytes).iter().flat_map(|value| value.to_le_bytes()).collect();
                let mut expected = vec![0.0; n * m];
                matmul(&x, MatrixRef { bytes: &wide, dtype: StoredDType::F32, rows: m, cols: k }, &mut expected);
                for out in by_each_kind(&x, n, MatrixRef { bytes: &bytes, dtype, rows: m, cols: k }) {
                    assert!(out.iter().zip(&expected).all(|(a, b)| a.to_bits() == b.to_bits()), "{dtype} {n} {k} {m}");
                }
            }
        }
    }

    /// A row's result would depend on its batch, on the tile it falls in, or on the number of threads.
    #[test]
    fn every_element_is_the_same_dot_product() {
        for (n, k, m) in [(1, 128, 512), (3, 37, 5), (5, 20, 7), (49, 64, 13), (200, 128, 301)] {
            let (x, w) = (values(n * k, 1), values(m * k, 2));
            let bytes: Vec<u8> = w.iter().flat_map(|v| v.to_le_bytes()).collect();
            let mut out = vec![0.0; n * m];
            matmul(&x, MatrixRef { bytes: &bytes, dtype: StoredDType::F32, rows: m, cols: k }, &mut out);
            for (i, out) in out.iter().enumerate() {
                let expected = dot(&x[i / m * k..][..k], &w[i % m * k..][..k]);
                assert_eq!(out.to_bits(), expected.to_bits(), "({n}, {k}) x ({m}, {k}) element {i}");
            }
        }
    }

    /// As above, with vectors of every kind, tall and short tiles.
    #[test]
    fn every_kind_of_vectors_gives_the_same_bits() {
        for (n, k, m) in [(3, 37, 5), (4, 48, 65), (13, 32, 97), (24, 256, 40)] {
            let (x, w) = (values(n * k, 5), values(m * k, 6));
            let bytes: Vec<u8> = w.iter().flat_map(|v| v.to_le_bytes()).collect();
            let w_ref = MatrixRef { bytes: &bytes, dtype: StoredDType::F32, rows: m, cols: k };
            for out in by_each_kind(&x, n, w_ref) {
                for (i, out) in out.iter().enumerate() {
                    assert_eq!(out.to_bits(), dot(&x[i / m * k..][..k], &w[i % m * k..][..k]).to_bits(), "{n} {k} {m}");
                }
            }
        }
    }

    /// Narrow weights would be read as something else than their exact float32 value.
    #[test]
    fn narrow_weights_are_widened_exactly() {
        type Encode = fn(f32) -> ([u8; 2], f32);
        let encodings: [(StoredDType, Encode); 2] = [
            (StoredDType::BF16, |v| (bf16::from_f32(v).to_le_bytes(), bf16::from_f32(v).to_f32())),
            (StoredDType::F16, |v| (f16::from_f32(v).to_le_bytes(), f16::from_f32(v).to_f32())),
        ];
        for ((dtype, encode), (n, k, m)) in
            encodings.into_iter().flat_map(|e| [(e, (9, 40, 17)), (e, (1, 64, 17)), (e, (3, 32, 8)), (e, (10, 64, 70))])
        {
            let (x, w) = (values(n * k, 3), values(m * k, 4));
            let bytes: Vec<u8> = w.iter().flat_map(|&v| encode(v).0).collect();
            let wide: Vec<f32> = w.iter().map(|&v| encode(v).1).collect();
            let mut out = vec![0.0; n * m];
            matmul(&x, MatrixRef { bytes: &bytes, dtype, rows: m, cols: k }, &mut out);
            for (i, out) in out.iter().enumerate() {
                assert_eq!(out.to_bits(), dot(&x[i / m * k..][..k], &wide[i % m * k..][..k]).to_bits());
            }
        }
    }
}
