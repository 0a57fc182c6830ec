//! Matrices in blocks as a GPU multiplies them (`cuda/kernels/product_blocks.cu`): what the blocks of a checkpoint hold, bit for
//! bit, in another order. Experts lie so in slots, and are uploaded so.
//!
//! A matrix of (outputs, k) lies in tiles of [`ROWS`] rows, a tile column by column, a column being 32 of k. In a column come, plane
//! by plane, those of all its rows:
//!
//! | plane | bytes of a row | what |
//! |---|---|---|
//! | low | 16, or 32 of Q8_0 and FP8 | the low 4 bits of integers, or all 8: a word or two for each of the four threads that share a row |
//! | upper | 4 of Q5_0, Q5_1 and Q5_K, 8 of Q6_K | their other bits: a quarter for each of these threads |
//! | own | 2, 4 of Q4_1 and Q5_1, none of FP8 | scales of these 32, as [`block_parts::of`] has them |
//!
//! Behind its columns a tile has what several of them share: what scales count in for each 256 of k, 4 bytes of Q4_K and Q5_K and 2
//! of Q6_K; the scale of FP8 for each 64, 4 bytes. So a matrix takes the bytes that it takes in its file, but of Q4_K and Q5_K, whose
//! scales are 6 bits there and 8 here, 4 for each 256 values more.
//!
//! A thread has 8 neighbours, 0 to 7. They lie so that a mask and a shift give pairs in the halves of a word: in half bytes 0, 2, 4, 6,
//! 1, 3, 5, 7 of a word, the lowest first; in bytes 0, 2, 1, 3 and 4, 6, 5, 7. Upper bits lie as half bytes do.

use rayon::prelude::*;
use sida_kernels::{
    block_parts::{self, Part},
    dtype::BLOCK,
};

use crate::StoredDType;

/// Rows of a tile; a matrix has whole ones.
pub(crate) const ROWS: usize = 64;

/// Bytes of each plane.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Planes {
    /// For 32 of k.
    low: usize,
    upper: usize,
    own: usize,
    /// For so many of k: bytes.
    shared: (usize, usize),
}

impl Planes {
    fn of(dtype: StoredDType) -> Self {
        let planes = |low, upper, own, shared| Self { low, upper, own, shared };
        let block = dtype.block().0;
        match dtype {
            StoredDType::Q4_0 => planes(16, 0, 2, (block, 0)),
            StoredDType::Q8_0 => planes(32, 0, 2, (block, 0)),
            StoredDType::Q4_1 => planes(16, 0, 4, (block, 0)),
            StoredDType::Q5_0 => planes(16, 4, 2, (block, 0)),
            StoredDType::Q5_1 => planes(16, 4, 4, (block, 0)),
            StoredDType::Q4K => planes(16, 0, 2, (block, 4)),
            StoredDType::Q5K => planes(16, 4, 2, (block, 4)),
            StoredDType::Q6K => planes(16, 8, 2, (block, 2)),
            StoredDType::F8 => planes(32, 0, 0, (block, 4)),
            StoredDType::F32 | StoredDType::BF16 | StoredDType::F16 => panic!("{dtype} has no blocks"),
        }
    }

    /// For 32 of k and a row.
    fn bytes(&self) -> usize {
        self.low + self.upper + self.own
    }
}

/// Bytes of a matrix of so many values.
pub(crate) fn bytes(dtype: StoredDType, values: usize) -> usize {
    let planes = Planes::of(dtype);
    values / BLOCK * planes.bytes() + values / planes.shared.0 * planes.shared.1
}

/// Orders a matrix with rows of `k` into `to`, which is [`bytes`] long, on all threads. Panics unless it is.
pub(crate) fn arrange(stored: &[u8], dtype: StoredDType, k: usize, to: &mut [u8]) {
    // A loop for each format, which knows where its blocks have what.
    macro_rules! arrange_each {
        ($($dtype:ident),+) => {
            match dtype {
                $(StoredDType::$dtype => {
                    arrange_in(stored, dtype, k, to, |block, part| block_parts::of(StoredDType::$dtype, block, part));
                })+
                StoredDType::F32 | StoredDType::BF16 | StoredDType::F16 => panic!("{dtype} has no blocks"),
            }
        };
    }
    arrange_each!(Q4_0, Q8_0, Q4_1, Q5_0, Q5_1, Q4K, Q5K, Q6K, F8);
}

/// With `part_of` a block.
#[inline(always)]
fn arrange_in<'s>(
    stored: &'s [u8],
    dtype: StoredDType,
    k: usize,
    to: &mut [u8],
    part_of: impl Fn(&'s [u8], usize) -> (Part, &'s [u8]) + Sync,
) {
    let (planes, (block, block_bytes)) = (Planes::of(dtype), dtype.block());
    let (parts, shared_bytes, row_bytes) = (block / BLOCK, planes.shared.1, k / block * block_bytes);
    assert_eq!(to.len(), bytes(dtype, dtype.values(stored.len())), "a matrix as a device has it");
    assert!(stored.len().is_multiple_of(ROWS * row_bytes), "a matrix has whole tiles");
    let tiles = to.par_chunks_exact_mut(bytes(dtype, ROWS * k)).zip(stored.par_chunks_exact(ROWS * row_bytes));
    tiles.for_each(|(tile, stored)| {
        let (columns, shared) = tile.split_at_mut(k / BLOCK * ROWS * planes.bytes());
        for (at, block) in stored.chunks_exact(block_bytes).enumerate() {
            let (row, first) = (at / (row_bytes / block_bytes), at % (row_bytes / block_bytes));
            let columns = &mut columns[first * parts * ROWS * planes.bytes()..][..parts * ROWS * planes.bytes()];
            for (part, column) in columns.chunks_exact_mut(ROWS * planes.bytes()).enumerate() {
                let (Part { eights, own }, rest) = part_of(block, part);
                let (low, others) = column.split_at_mut(ROWS * planes.low);
                let (upper, owns) = others.split_at_mut(ROWS * planes.upper);
                match planes.low {
                    16 => put(eights, half_bytes, &mut low[row * 16..][..16]),
                    _ => put(eights, whole_bytes, &mut low[row * 32..][..32]),
                }
                match planes.upper {
                    4 => put(eights, fifth_bits, &mut upper[row * 4..][..4]),
                    8 => put(eights, high_bits, &mut upper[row * 8..][..8]),
                    _ => {}
                }
                match planes.own {
                    2 => owns[row * 2..][..2].copy_from_slice(&own[..2]),
                    4 => owns[row * 4..][..4].copy_from_slice(&own),
                    _ => {}
                }
                if part == 0 {
                    let to = &mut shared[(first * ROWS + row) * shared_bytes..][..shared_bytes];
                    to.copy_from_slice(&rest[..shared_bytes]);
                }
            }
        }
    });
}

/// What each of the four threads that share a row takes.
fn put<const BYTES: usize>(eights: [u64; 4], of: impl Fn(u64) -> [u8; BYTES], to: &mut [u8]) {
    to.as_chunks_mut().0.iter_mut().zip(eights).for_each(|(to, eight)| *to = of(eight));
}

/// Of eight bytes the lowest bits, so many of each: those at even places drawn together, and those at odd ones.
fn even_and_odd(eight: u64, bits: u32) -> [u64; 2] {
    const EACH: u64 = 0x0001_0001_0001_0001;
    // What is at bit 16 i is moved to bit 48 + i * bits, by a product whose other terms stay below or leave the word.
    let together = (0..4).fold(0, |factor, i| factor | 1 << (48 - i * (16 - bits)));
    let of = |each: u64| (each & (EACH * ((1 << bits) - 1))).wrapping_mul(together) >> 48;
    [of(eight), of(eight >> 8)]
}

/// The low half bytes of eight bytes.
fn half_bytes(eight: u64) -> [u8; 4] {
    let [even, odd] = even_and_odd(eight, 4);
    ((even | odd << 16) as u32).to_le_bytes()
}

fn whole_bytes(eight: u64) -> [u8; 8] {
    let [a, b, c, d, e, f, g, h] = eight.to_le_bytes();
    [a, c, b, d, e, g, f, h]
}

/// The bits above the lowest four: one of each.
fn fifth_bits(eight: u64) -> [u8; 1] {
    let [even, odd] = even_and_odd(eight >> 4, 1);
    [(even | odd << 4) as u8]
}

/// The bits above the lowest four: two of each.
fn high_bits(eight: u64) -> [u8; 2] {
    even_and_odd(eight >> 4, 2).map(|bits| bits as u8)
}

#[cfg(test)]
mod tests {
    use sida_kernels::arbitrary;

    use super::*;

    /// The integer of neighbour `i`, as a thread takes it from its words.
    fn taken(planes: Planes, low: &[u8], upper: &[u8], i: usize) -> u8 {
        let (pair, second) = (i / 2, i % 2);
        let bits = |bytes: &[u8], per: usize| {
            let half = u16::from_le_bytes(bytes.try_into().unwrap());
            half >> (per * pair) & ((1 << per) - 1)
        };
        let upper = match planes.upper {
            0 => 0,
            4 => upper[0] >> (4 * second + pair) & 1,
            _ => upper[second] >> (2 * pair) & 3,
        };
        match planes.low {
            16 => bits(&low[second * 2..][..2], 4) as u8 | upper << 4,
            // Two bytes of a word are a pair.
            _ => low[pair / 2 * 4 + second * 2 + pair % 2],
        }
    }

    /// A weight would come to the device as another one.
    #[test]
    fn every_weight_is_where_its_thread_looks() {
        for dtype in StoredDType::BLOCKS {
            let planes = Planes::of(dtype);
            for (outputs, k) in [(64, 256), (192, 768)] {
                let stored = arbitrary::blocks(dtype, outputs * k, 3);
                let mut arranged = vec![0xaa; bytes(dtype, outputs * k)];
                arrange(&stored, dtype, k, &mut arranged);
                let (block, block_bytes) = dtype.block();
                for (row, column) in (0..outputs).flat_map(|row| (0..k / BLOCK).map(move |column| (row, column))) {
                    let at = (row * k + column * BLOCK) / block;
                    let stored = &stored[at * block_bytes..][..block_bytes];
                    let (part, rest) = block_parts::of(dtype, stored, column % (block / BLOCK));
                    let tile = &arranged[row / ROWS * bytes(dtype, ROWS * k)..][..bytes(dtype, ROWS * k)];
                    let (columns, shared) = tile.split_at(k / BLOCK * ROWS * planes.bytes());
                    let own = &columns[column * ROWS * planes.bytes()..][..ROWS * planes.bytes()];
                    let (low, own) = own.split_at(ROWS * planes.low);
                    let (upper, own) = own.split_at(ROWS * planes.upper);
                    let row = row % ROWS;
                    for (thread, eight) in part.eights.iter().enumerate() {
                        let quarter = |plane: &[u8], bytes: usize| {
                            plane[row * bytes + thread * bytes / 4..][..bytes / 4].to_vec()
                        };
                        let (low, upper) = (quarter(low, planes.low), quarter(upper, planes.upper));
                        let found: Vec<u8> = (0..8).map(|i| taken(planes, &low, &upper, i)).collect();
                        assert_eq!(found, eight.to_le_bytes(), "{dtype}, row {row}, column {column}");
                    }
                    assert_eq!(own[row * planes.own..][..planes.own], part.own[..planes.own], "{dtype}");
                    let (shared_k, bytes) = planes.shared;
                    let shared = &shared[(column * BLOCK / shared_k * ROWS + row) * bytes..][..bytes];
                    assert_eq!(shared, rest, "{dtype}, row {row}, column {column}");
                }
            }
        }
    }

    /// Slots would be larger than experts in their files.
    #[test]
    fn only_scales_of_six_bits_take_more_than_in_a_file() {
        for dtype in StoredDType::BLOCKS {
            let more = if matches!(dtype, StoredDType::Q4K | StoredDType::Q5K) { 4 } else { 0 };
            assert_eq!(bytes(dtype, 1024), dtype.bytes(1024) + 4 * more, "{dtype}");
        }
    }
}
