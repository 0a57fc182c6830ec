//! Matrices in blocks as a GPU multiplies them (`cuda/kernels/product_blocks.cu`): what the blocks of a checkpoint hold, bit for
//! bit, in another order. Experts lie so in slots, and are uploaded so.
//!
//! A matrix of (outputs, k) lies column by column, a column being 32 of k. In each come, plane by plane, those of all rows:
//!
//! | plane | bytes for 32 of k | what |
//! |---|---|---|
//! | low | 16, or 32 of Q8_0 and FP8 | the low 4 bits of integers, or all 8: a word or two for each of the four threads that share a row |
//! | upper | 4 of Q5_0, Q5_1 and Q5_K, 8 of Q6_K | their other bits: a quarter for each of these threads |
//! | own | 2, 4 of Q4_1 and Q5_1, none of FP8 | scales of these 32, as [`block_parts::of`] has them |
//!
//! Behind all columns lies what several of them share: what scales count in for each 256 of k, 4 bytes of Q4_K and Q5_K and 2 of
//! Q6_K; the scale of FP8 for each 64, 4 bytes. So a matrix takes the bytes that it takes in its file, but of Q4_K and Q5_K, whose
//! scales are 6 bits there and 8 here, 4 for each 256 values more.
//!
//! A thread has 8 neighbours, 0 to 7. They lie so that a mask and a shift give pairs in the halves of a word: in half bytes 0, 2, 4, 6,
//! 1, 3, 5, 7 of a word, the lowest first; in bytes 0, 2, 1, 3 and 4, 6, 5, 7. Upper bits lie as half bytes do.

use sida_kernels::{
    block_parts::{self, Part},
    dtype::BLOCK,
};

use crate::StoredDType;

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

/// Orders a matrix with rows of `k` into `to`, which is [`bytes`] long. Panics unless it is.
pub(crate) fn arrange(stored: &[u8], dtype: StoredDType, k: usize, to: &mut [u8]) {
    let planes = Planes::of(dtype);
    let (block, block_bytes) = dtype.block();
    let (values, parts) = (dtype.values(stored.len()), block / BLOCK);
    assert_eq!(to.len(), bytes(dtype, values), "a matrix as a device has it");
    let outputs = values / k;
    let (columns, shared) = to.split_at_mut(values / BLOCK * planes.bytes());
    for (at, block_bytes) in stored.chunks_exact(block_bytes).enumerate() {
        let (row, block_at) = (at / (k / block), at % (k / block));
        for part in 0..parts {
            let (Part { eights, own }, rest) = block_parts::of(dtype, block_bytes, part);
            let column =
                &mut columns[(block_at * parts + part) * outputs * planes.bytes()..][..outputs * planes.bytes()];
            let (low, others) = column.split_at_mut(outputs * planes.low);
            let (upper, owns) = others.split_at_mut(outputs * planes.upper);
            let low = &mut low[row * planes.low..][..planes.low];
            let upper = &mut upper[row * planes.upper..][..planes.upper];
            match planes.low {
                16 => low.as_chunks_mut().0.iter_mut().zip(eights).for_each(|(to, eight)| *to = half_bytes(eight)),
                _ => low.as_chunks_mut().0.iter_mut().zip(eights).for_each(|(to, eight)| *to = whole_bytes(eight)),
            }
            match planes.upper {
                4 => upper.iter_mut().zip(eights).for_each(|(to, eight)| *to = fifth_bits(eight)),
                _ => upper.as_chunks_mut().0.iter_mut().zip(eights).for_each(|(to, eight)| *to = high_bits(eight)),
            }
            owns[row * planes.own..][..planes.own].copy_from_slice(&own[..planes.own]);
            let (_, shared_bytes) = planes.shared;
            shared[(block_at * outputs + row) * shared_bytes..][..shared_bytes].copy_from_slice(&rest[..shared_bytes]);
        }
    }
}

/// The bytes at even places of eight, each in 16 bits, then those at odd ones.
fn even_and_odd(eight: u64) -> [u64; 2] {
    [eight & 0x00ff_00ff_00ff_00ff, eight >> 8 & 0x00ff_00ff_00ff_00ff]
}

/// Four numbers of 16 bits drawn together to so many bits each.
fn together(each: u64, bits: u32) -> u64 {
    let mask = (1 << bits) - 1;
    (0..4).fold(0, |all, at| all | (each >> (16 * at) & mask) << (bits * at))
}

/// The low half bytes of eight bytes.
fn half_bytes(eight: u64) -> [u8; 4] {
    let [even, odd] = even_and_odd(eight);
    ((together(even, 4) | together(odd, 4) << 16) as u32).to_le_bytes()
}

fn whole_bytes(eight: u64) -> [u8; 8] {
    let [a, b, c, d, e, f, g, h] = eight.to_le_bytes();
    [a, c, b, d, e, g, f, h]
}

/// The bits above the lowest four: one of each.
fn fifth_bits(eight: u64) -> u8 {
    let [even, odd] = even_and_odd(eight >> 4);
    (together(even, 1) | together(odd, 1) << 4) as u8
}

/// The bits above the lowest four: two of each.
fn high_bits(eight: u64) -> [u8; 2] {
    let [even, odd] = even_and_odd(eight >> 4);
    [together(even, 2) as u8, together(odd, 2) as u8]
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
            for (outputs, k) in [(1, 256), (3, 512), (64, 768)] {
                let stored = arbitrary::blocks(dtype, outputs * k, 3);
                let mut arranged = vec![0xaa; bytes(dtype, outputs * k)];
                arrange(&stored, dtype, k, &mut arranged);
                let (block, block_bytes) = dtype.block();
                let (columns, shared) = arranged.split_at(outputs * k / BLOCK * planes.bytes());
                for (row, column) in (0..outputs).flat_map(|row| (0..k / BLOCK).map(move |column| (row, column))) {
                    let at = (row * k + column * BLOCK) / block;
                    let stored = &stored[at * block_bytes..][..block_bytes];
                    let (part, rest) = block_parts::of(dtype, stored, column % (block / BLOCK));
                    let own = &columns[column * outputs * planes.bytes()..][..outputs * planes.bytes()];
                    let (low, own) = own.split_at(outputs * planes.low);
                    let (upper, own) = own.split_at(outputs * planes.upper);
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
                    let shared = &shared[(column * BLOCK / shared_k * outputs + row) * bytes..][..bytes];
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
