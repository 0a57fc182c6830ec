//! Matrices in blocks as a GPU multiplies them (`cuda/kernels/product_blocks.cu`): the blocks of a checkpoint, bit for bit, in
//! another order. Experts lie so in slots, and are uploaded so.
//!
//! A matrix of (outputs, k), k a multiple of 32:
//!
//! | for each | bytes | what |
//! |---|---|---|
//! | row, 32 of k | 16 of Q4_0, 32 of Q8_0 | the integers, a quarter for each of the four threads that share a row: 8 neighbours |
//! | 32 of k, row | 2 | the scale, a binary16 |
//!
//! The 8 neighbours of a thread, 0 to 7, lie so that a mask and a shift give pairs in the halves of a word: of Q4_0, half bytes
//! 0, 2, 4, 6, 1, 3, 5, 7 of a word, the lowest first; of Q8_0, bytes 0, 2, 1, 3 and 4, 6, 5, 7.

use sida_kernels::dtype::{BLOCK, SCALE_BYTES};

use crate::StoredDType;

/// Neighbours of a row that a thread multiplies at a time.
const NEIGHBOURS: usize = 8;

/// Bits of an integer, of formats that a GPU multiplies as they are.
pub(crate) fn integer_bits(dtype: StoredDType) -> Option<usize> {
    match dtype {
        StoredDType::Q4_0 => Some(4),
        StoredDType::Q8_0 => Some(8),
        _ => None,
    }
}

/// Orders a matrix with rows of `k`, of such a format, into `to`, which has as many bytes. Panics unless it has.
pub(crate) fn arrange(stored: &[u8], dtype: StoredDType, k: usize, to: &mut [u8]) {
    assert_eq!(stored.len(), to.len(), "a matrix has the same bytes in another order");
    match dtype {
        StoredDType::Q4_0 => arrange_blocks::<{ BLOCK / 2 }>(stored, k, to, halves_of_threads),
        StoredDType::Q8_0 => arrange_blocks::<BLOCK>(stored, k, to, bytes_of_threads),
        other => panic!("{other} is not multiplied as it is"),
    }
}

/// With blocks of so many bytes of integers, which `order` orders.
fn arrange_blocks<const INTEGERS: usize>(
    stored: &[u8],
    k: usize,
    to: &mut [u8],
    order: impl Fn(&[u8; INTEGERS], &mut [u8; INTEGERS]),
) {
    let (blocks, outputs) = (k / BLOCK, stored.len() / (k / BLOCK * (SCALE_BYTES + INTEGERS)));
    let (integers, scales) = to.split_at_mut(outputs * blocks * INTEGERS);
    let from = stored.chunks_exact(SCALE_BYTES + INTEGERS).zip(integers.as_chunks_mut().0);
    for (at, (block, integers)) in from.enumerate() {
        let (scale, rest) = block.split_at(SCALE_BYTES);
        order(rest.try_into().expect("a block's integers"), integers);
        let (row, column) = (at / blocks, at % blocks);
        scales[(column * outputs + row) * SCALE_BYTES..][..SCALE_BYTES].copy_from_slice(scale);
    }
}

/// Low half bytes are values 0 to 15, high ones 16 to 31.
fn halves_of_threads(halves: &[u8; BLOCK / 2], to: &mut [u8; BLOCK / 2]) {
    for (thread, word) in to.as_chunks_mut::<4>().0.iter_mut().enumerate() {
        let bytes = halves[thread % 2 * NEIGHBOURS..][..NEIGHBOURS].try_into().expect("8 of 16 bytes");
        let values = u64::from_le_bytes(bytes) >> (thread / 2 * 4) & 0x0f0f_0f0f_0f0f_0f0f;
        // Those at even places, each in 16 bits, are drawn together to half bytes next to each other; then the others.
        let together = |each: u64| {
            let pairs = (each | each >> 12) & 0x0000_00ff_0000_00ff;
            (pairs | pairs >> 24) as u32 & 0xffff
        };
        let (even, odd) = (values & 0x00ff_00ff_00ff_00ff, values >> 8 & 0x00ff_00ff_00ff_00ff);
        *word = (together(even) | together(odd) << 16).to_le_bytes();
    }
}

fn bytes_of_threads(bytes: &[u8; BLOCK], to: &mut [u8; BLOCK]) {
    for (&[a, b, c, d], word) in bytes.as_chunks::<4>().0.iter().zip(to.as_chunks_mut().0) {
        *word = [a, c, b, d];
    }
}

#[cfg(test)]
mod tests {
    use rand::{Rng, SeedableRng, rngs::StdRng};

    use super::*;

    /// The integers of a thread's word or words, as the device takes them.
    fn taken(bits: usize, words: &[u8]) -> Vec<i32> {
        let word = |at: usize| u32::from_le_bytes(words[at..at + 4].try_into().unwrap());
        let pair = |word: u32, mask: u32| [word & mask, word >> 16 & mask];
        match bits {
            4 => (0..4).flat_map(|at| pair(word(0) >> (4 * at), 0xf)).map(|half| half as i32 - 8).collect(),
            _ => [word(0), word(0) >> 8, word(4), word(4) >> 8]
                .into_iter()
                .flat_map(|word| pair(word, 0xff))
                .map(|byte| i32::from(byte as u8 as i8))
                .collect(),
        }
    }

    /// A weight would come to the device as another one.
    #[test]
    fn every_weight_is_where_its_thread_looks() {
        let mut random = StdRng::seed_from_u64(3);
        for dtype in [StoredDType::Q4_0, StoredDType::Q8_0] {
            let bits = integer_bits(dtype).unwrap();
            for (outputs, k) in [(1, 32), (3, 128), (64, 96)] {
                let values = random_blocks(&mut random, dtype, outputs * k);
                let mut arranged = vec![0xaa; values.len()];
                arrange(&values, dtype, k, &mut arranged);
                let (integers, scales) = arranged.split_at(outputs * k * bits / 8);
                for (at, expected) in dtype.widen(&values).chunks(NEIGHBOURS).enumerate() {
                    let (row, column) = (at * NEIGHBOURS / k, at * NEIGHBOURS % k / BLOCK);
                    let scale = scales[(column * outputs + row) * SCALE_BYTES..][..2].try_into().unwrap();
                    let scale = half::f16::from_le_bytes(scale).to_f32();
                    let found: Vec<f32> =
                        taken(bits, &integers[at * bits..]).into_iter().map(|value| value as f32 * scale).collect();
                    assert_eq!(found, expected, "{dtype}, row {row}, block {column}");
                }
            }
        }
    }

    fn random_blocks(random: &mut StdRng, dtype: StoredDType, values: usize) -> Vec<u8> {
        let mut bytes: Vec<u8> = (0..dtype.bytes(values)).map(|_| random.random()).collect();
        for block in bytes.chunks_exact_mut(dtype.bytes(BLOCK)) {
            block[..2].copy_from_slice(&half::f16::from_f32(random.random::<f32>() + 0.1).to_le_bytes());
        }
        bytes
    }
}
