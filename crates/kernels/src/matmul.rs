//! `out = x W^T` with W as checkpoints store it: row-major (out, in), in float32, bfloat16, float16 or blocks.
//!
//! Libraries pack W, choose a kernel by the number of rows, and so change a row's bits with its company; and
//! they read bf16 slower than f32 on a CPU. Here every output element is one dot product in one fixed order
//! (see `lanes`), W is used where it lies, so making an expert resident is a copy and nothing else, and it is
//! widened to f32 a few rows at a time on its way through the first-level cache. With few rows the product
//! is bound by reading W, and bf16 halves that, blocks of 4 bits take a seventh.
//!
//! Called by `Linear` for the backbone, by `ExpertShape` for experts, and by the predictor nets.

use std::{cell::RefCell, mem::MaybeUninit, ops::Range, sync::LazyLock};

use rayon::prelude::*;

use super::{
    aligned_floats::AlignedFloats,
    block_loads::{SCALES, Scales},
    lanes::{self, Kernel, Lanes},
    stored_rows::{Bf16, F32, Q4, Q4K, Q6K, Q8, StoredRows, widen_stored},
    tiles::{Out, Rows, X},
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
    products_into(x, std::iter::once(w), out);
}

/// [`product_into`] with matrices of one width, one below the other, as if they were one.
pub fn products_into<'a>(x: &[f32], matrices: impl Iterator<Item = MatrixRef<'a>> + Clone, out: &mut Vec<f32>) {
    let (mut rows, mut len) = (0, 0);
    for w in matrices.clone() {
        rows += w.rows;
        len += x.len().checked_div(w.cols).unwrap_or(0) * w.rows;
    }
    out.clear();
    out.reserve(len);
    let room = &mut out.spare_capacity_mut()[..len];
    let mut column = 0;
    for w in matrices {
        write_product(x, w, room, column, rows);
        column += w.rows;
    }
    // SAFETY: `write_product` filled the columns of each.
    unsafe { out.set_len(len) };
}

/// `out = x W^T`: x (n, cols), out (n, rows). Splits over the threads of the current rayon pool when there
/// is enough to do.
///
/// Panics when the lengths do not fit: shapes are checked where weights are loaded.
pub fn matmul(x: &[f32], w: MatrixRef<'_>, out: &mut [f32]) {
    // SAFETY: floats that were written stay written.
    let out = unsafe { std::mem::transmute::<&mut [f32], &mut [MaybeUninit<f32>]>(out) };
    write_product(x, w, out, 0, w.rows);
}

/// [`matmul`] into memory that holds nothing yet, whose rows are `stride` long: writes `w.rows` columns of them, from `column`
/// on.
fn write_product(x: &[f32], w: MatrixRef<'_>, out: &mut [MaybeUninit<f32>], column: usize, stride: usize) {
    let own = column..column + w.rows;
    assert!(own.end <= stride, "columns {own:?} of {stride}");
    if w.cols == 0 || w.rows == 0 || x.is_empty() {
        out.chunks_exact_mut(stride.max(1)).for_each(|row| row[own.clone()].fill(MaybeUninit::new(0.0)));
        return;
    }
    let n = x.len() / w.cols;
    assert_eq!(x.len(), n * w.cols, "x is (n, {})", w.cols);
    assert_eq!(out.len(), n * stride, "out is ({n}, {stride})");
    let MatrixRef { bytes, dtype, rows, cols } = w;
    assert!(cols.is_multiple_of(dtype.block().0), "rows of {cols} values are not whole blocks of {dtype}");
    assert_eq!(bytes.len(), rows * dtype.bytes(cols), "W is ({rows}, {cols}) {dtype}");
    let out = OutPointer { first: out[column..].as_mut_ptr().cast(), stride };
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
    ROOMS.with_borrow_mut(|rooms| lanes::run(Columns { x, n, w, columns, out, rooms }));
}

/// Whether vectors that lie one after another from here on begin where cache lines do.
fn is_aligned(floats: *const f32) -> bool {
    floats.addr().is_multiple_of(lanes::LINE_BYTES)
}

/// Where results go. Pieces write disjoint columns of it.
#[derive(Clone, Copy)]
struct OutPointer {
    first: *mut f32,
    /// Floats from row to row.
    stride: usize,
}

// SAFETY: each piece writes only its own columns, and `matmul` holds the one `&mut` until all are done.
unsafe impl Send for OutPointer {}
// SAFETY: as above.
unsafe impl Sync for OutPointer {}

/// What a thread keeps from product to product.
#[derive(Default)]
struct Rooms {
    /// Some rows of x, each filled up with zeros to whole vectors.
    x: AlignedFloats,
    /// As many rows of W as a tile has columns, widened, and filled up the same.
    w: AlignedFloats,
}

thread_local! {
    static ROOMS: RefCell<Rooms> = RefCell::default();
}

/// Some output columns (rows of W) of a product.
struct Columns<'a> {
    x: &'a [f32],
    n: usize,
    w: MatrixRef<'a>,
    columns: Range<usize>,
    out: OutPointer,
    rooms: &'a mut Rooms,
}

impl Kernel for Columns<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<L: Lanes>(mut self) {
        // SAFETY: `matmul` checked the lengths. The tile sizes are those whose accumulators fit the registers.
        unsafe {
            match L::TILE_ROWS {
                4 => self.tiles::<L, 4, 4>(),
                2 => self.tiles::<L, 2, 3>(),
                _ => self.tiles::<L, 1, 4>(),
            }
        }
    }
}

impl<'a> Columns<'a> {
    /// With few rows of x, widening W ahead would cost as much as the product: it is widened on the way instead. Of other
    /// formats that is no quicker out of memory, and each would be compiled for all tiles (docs/decisions/0030).
    #[inline(always)]
    unsafe fn tiles<L: Lanes, const R: usize, const C: usize>(&mut self) {
        let is_whole = self.w.cols.is_multiple_of(lanes::LANES);
        let scales = LazyLock::force(&SCALES);
        // SAFETY: the caller's.
        unsafe {
            match self.w.dtype {
                StoredDType::F32 if self.n <= R => self.straight::<L, _, R, C>(F32::<false>),
                StoredDType::BF16 if self.n <= R && is_whole => self.straight::<L, _, R, C>(Bf16),
                StoredDType::Q8_0 if self.n <= R => self.straight::<L, _, R, C>(Q8(scales)),
                StoredDType::Q4_0 if self.n <= R => self.straight::<L, _, R, C>(Q4(scales)),
                StoredDType::Q4K if self.n <= R => self.straight::<L, _, R, C>(Q4K(scales)),
                StoredDType::Q6K if self.n <= R => self.straight::<L, _, R, C>(Q6K(scales)),
                _ => self.widened::<L, R, C>(scales),
            }
        }
    }

    /// At most R rows, against W where it lies.
    #[inline(always)]
    unsafe fn straight<L: Lanes, W: StoredRows, const R: usize, const C: usize>(&mut self, stored: W) {
        let x = self.aligned(0..self.n);
        let mut column = self.columns.start;
        while column < self.columns.end {
            let columns = C.min(self.columns.end - column);
            // SAFETY: x and these rows of W hold k values each, and out has room for a value of each pair.
            unsafe {
                let w = Rows { stored, first: self.stored(column, columns).as_ptr(), k: self.w.cols };
                w.against_all::<L, R, C>(columns, x, self.out_at(0, column), &[]);
            }
            column += C;
        }
    }

    /// In blocks of rows, against W widened some rows at a time.
    #[inline(always)]
    unsafe fn widened<L: Lanes, const R: usize, const C: usize>(&mut self, scales: &Scales) {
        let width = self.w.cols.next_multiple_of(lanes::LANES);
        // Blocks of about one size: a last one of a row or two would cost as much reading of W as a whole one.
        let blocks = self.n.div_ceil(ROW_BLOCK.max(ROW_BLOCK_FLOATS / self.w.cols));
        let block_rows = self.n.div_ceil(blocks).next_multiple_of(R);
        let mut block = 0;
        while block < self.n {
            let x = self.aligned(block..self.n.min(block + block_rows));
            let mut column = self.columns.start;
            while column < self.columns.end {
                let columns = C.min(self.columns.end - column);
                // SAFETY: both rooms hold rows of `width` values, and out has room for a value of each pair.
                unsafe {
                    // Multiplying few rows is over before the next of W are here: they are asked for as these are widened.
                    let soon = self.stored(column + C, C);
                    let (soon, later) = soon.split_at(if self.n <= R { soon.len() } else { 0 });
                    let first = self.widen::<L>(scales, column, columns, width, soon).cast();
                    let w = Rows { stored: F32::<true>, first, k: width };
                    w.against_all::<L, R, C>(columns, x, self.out_at(block, column), later);
                }
                column += C;
            }
            block += block_rows;
        }
    }

    /// Rows of x where no vector lies across two cache lines: reading those would take longer than multiplying. Copied, if
    /// they are not where they should be already.
    #[inline(always)]
    fn aligned(&mut self, rows: Range<usize>) -> X {
        let (k, width) = (self.w.cols, self.w.cols.next_multiple_of(lanes::LANES));
        let x = &self.x[rows.start * k..rows.end * k];
        if k == width && is_aligned(x.as_ptr()) {
            return X { first: x.as_ptr(), stride: k, rows: rows.len() };
        }
        let room = self.rooms.x.rows(rows.len(), width);
        for (row, room) in x.chunks_exact(k).zip(room.chunks_exact_mut(width)) {
            room[..k].copy_from_slice(row);
            room[k..].fill(0.0);
        }
        X { first: room.as_ptr(), stride: width, rows: rows.len() }
    }

    /// The bytes of `columns` rows of W from `column` on, as far as they are ours.
    #[inline(always)]
    fn stored(&self, column: usize, columns: usize) -> &'a [u8] {
        let row_bytes = self.w.dtype.bytes(self.w.cols);
        let (from, to) = (column.min(self.columns.end), (column + columns).min(self.columns.end));
        &self.w.bytes[from * row_bytes..to * row_bytes]
    }

    /// Where the results of some rows and columns go.
    #[inline(always)]
    unsafe fn out_at(&self, row: usize, column: usize) -> Out {
        // SAFETY: the caller's row and column.
        Out { first: unsafe { self.out.first.add(row * self.out.stride + column) }, stride: self.out.stride }
    }

    /// `columns` rows of W from `column` on as float32, each filled up with zeros to `width` values; those that are so
    /// already where they lie. Half of what a tile reads is x, and aligned: then the other half need not be. With each row
    /// one of `soon` is asked for, which is needed next.
    #[inline(always)]
    unsafe fn widen<L: Lanes>(
        &mut self,
        scales: &Scales,
        column: usize,
        columns: usize,
        width: usize,
        soon: &[u8],
    ) -> *const f32 {
        let (k, dtype, row_bytes) = (self.w.cols, self.w.dtype, self.w.dtype.bytes(self.w.cols));
        let bytes = &self.w.bytes[column * row_bytes..(column + columns) * row_bytes];
        if dtype == StoredDType::F32 && k == width {
            return bytes.as_ptr().cast();
        }
        let mut soon = soon.chunks(row_bytes);
        let widened = self.rooms.w.rows(columns, width);
        for (row, room) in bytes.chunks_exact(row_bytes).zip(widened.chunks_exact_mut(width)) {
            let (room, rest) = room.split_at_mut(k);
            rest.fill(0.0);
            // SAFETY: the caller's machine.
            unsafe { L::prefetch(soon.next().unwrap_or_default()) };
            // SAFETY: the caller's machine.
            unsafe { widen_stored::<L>(dtype, scales, row, room) };
        }
        widened.as_ptr()
    }
}
