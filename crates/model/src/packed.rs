//! bf16 matrices in three quarters of their bytes, with every bit of them. Experts lie so on a GPU, are uploaded so, and are
//! multiplied from it (`cuda/kernels/product_packed.cu`): more of them fit, they come sooner, and less is read.
//!
//! Of the 8 bits of a weight's exponent some 2.6 are information, in trained weights as in normally distributed ones. Here it
//! takes 4: exponents of a row are counted from the row's base, so that 2 to 15 reach down to a 16,000th of its largest
//! weight. What is smaller, 2 weights in 10,000, is kept beside the row; 0 is 0. (Codes of variable length reach 66%,
//! as in DFloat11, arXiv 2504.11651, but must be unpacked before they are used.)
//!
//! A matrix of (outputs, k), k a multiple of 32:
//!
//! | for each | bytes | what |
//! |---|---|---|
//! | row | [`HEAD_BYTES`] | what its base adds to a pair of weights, as u32; its first place beyond, as u32; its first [`NEAR`] exceptions |
//! | row, 32 of k | [`GROUP_BYTES`] | for each weight a byte: the lowest bit of the exponent, and the fraction; then for each 8 a word: signs, and the exponents' three other bits |
//! | 256 weights | 1 | places for further exceptions |
//!
//! Where the three other bits are 0, the byte is the number of the row's exception, from 1, or 0 for a zero. Bits of the words
//! lie so that the weights of a pair come to their places by one rotation (see [`SIGN_AND_EXPONENT`]).

use rayon::prelude::*;

/// Of each row.
const HEAD_BYTES: usize = 16;
/// Exceptions that are in the head.
const NEAR: usize = 4;
/// Weights that lie together, and their bytes.
const GROUP: usize = 32;
const GROUP_BYTES: usize = GROUP / 2 * 3;
/// An exception beyond the heads takes two bytes: there is room for one in 512 weights.
const WEIGHTS_PER_BYTE_BEYOND: usize = 256;
/// Parts begin at whole cache lines.
const LINE_BYTES: usize = 128;
/// Exceptions of a row at most: what a byte can number.
const EXCEPTIONS_MAX: usize = 255;
/// Where sign and upper bits of the exponent are in a pair of weights, each less its base. In the word for four pairs, those
/// of pair i are rotated to the left by 4 i bits.
const SIGN_AND_EXPONENT: u32 = 0x8700_8700;
/// A row of zeros has none of them for an exception, which would take the device long: each is the lowest code, [`ZERO_CODE`], less as
/// much.
const ZERO_CODE: u16 = 0x0100;
const ZERO_BASE: u32 = 0_u32.wrapping_sub(0x0100_0100);

/// Rows that a thread packs before another may take over.
const ROWS_AT_ONCE: usize = 64;

/// Bytes of a packed matrix.
pub(crate) fn matrix_bytes(outputs: usize, k: usize) -> usize {
    (beyond_at(outputs, k) + outputs * k / WEIGHTS_PER_BYTE_BEYOND).next_multiple_of(LINE_BYTES)
}

fn beyond_at(outputs: usize, k: usize) -> usize {
    outputs * (HEAD_BYTES + k / GROUP * GROUP_BYTES)
}

/// Packs a matrix of bf16 values (little endian) with rows of `k` into `packed`, which is [`matrix_bytes`] long. False if it
/// has more exceptions than there are places for.
pub(crate) fn pack(plain: &[u8], k: usize, packed: &mut [u8]) -> bool {
    let weights: &[[u8; 2]] = plain.as_chunks().0;
    let outputs = weights.len() / k;
    let (head_bytes, row_bytes) = (outputs * HEAD_BYTES, k / GROUP * GROUP_BYTES);
    let (rows, beyond) = packed.split_at_mut(beyond_at(outputs, k));
    let (heads, rows) = rows.split_at_mut(head_bytes);
    let rows = weights.par_chunks_exact(k).zip(rows.par_chunks_exact_mut(row_bytes)).with_min_len(ROWS_AT_ONCE);
    let packed =
        rows.zip(heads.par_chunks_exact_mut(HEAD_BYTES)).map(|((row, packed), head)| pack_row(row, head, packed));
    let exceptions: Vec<Vec<u16>> = packed.collect();
    let (mut taken, places) = (0, beyond.len() / 2);
    for (exceptions, head) in exceptions.into_iter().zip(heads.chunks_exact_mut(HEAD_BYTES)) {
        let far = exceptions.len().saturating_sub(NEAR);
        if exceptions.len() > EXCEPTIONS_MAX || taken + far > places {
            return false;
        }
        head[4..8].copy_from_slice(&(taken as u32).to_le_bytes());
        for (number, exception) in exceptions.into_iter().enumerate() {
            let place =
                if number < NEAR { &mut head[8 + 2 * number..] } else { &mut beyond[2 * (taken + number - NEAR)..] };
            place[..2].copy_from_slice(&exception.to_le_bytes());
        }
        taken += far;
    }
    true
}

/// Returns the row's exceptions.
fn pack_row(row: &[[u8; 2]], head: &mut [u8], packed: &mut [u8]) -> Vec<u16> {
    let highest = row.iter().map(|&weight| exponent(u16::from_le_bytes(weight))).filter(|&e| e < 255).max();
    let base = highest.unwrap_or(0).saturating_sub(15);
    let is_zero = row.iter().all(|&weight| u16::from_le_bytes(weight) & 0x7fff == 0);
    head.fill(0);
    let added = if is_zero { ZERO_BASE } else { u32::from(base << 7) * 0x0001_0001 };
    head[..4].copy_from_slice(&added.to_le_bytes());
    let mut exceptions = Vec::new();
    for (group, packed) in row.chunks_exact(GROUP).zip(packed.chunks_exact_mut(GROUP_BYTES)) {
        let (bytes, words) = packed.split_at_mut(GROUP);
        let eights = group.chunks_exact(8).zip(bytes.chunks_exact_mut(8).zip(words.chunks_exact_mut(4)));
        for (eight, (bytes, word)) in eights {
            let mut codes = [0_u16; 8];
            for ((&weight, code), byte) in eight.iter().zip(&mut codes).zip(bytes) {
                let weight = u16::from_le_bytes(weight);
                let (sign, rest) = (weight & 0x8000, weight & 0x7fff);
                let less = exponent(weight).wrapping_sub(base);
                if is_zero {
                    (*code, *byte) = (sign | ZERO_CODE, 0);
                } else if rest != 0 && !(2..16).contains(&less) {
                    exceptions.push(weight);
                    *byte = exceptions.len() as u8;
                } else {
                    // Of a zero all bits but the sign's.
                    let rest = if rest == 0 { 0 } else { rest - (base << 7) };
                    (*code, *byte) = (sign | rest & 0x0700, rest as u8);
                }
            }
            let pairs = codes.as_chunks().0.iter().enumerate();
            let pair = |(at, &[low, high]): (usize, &[u16; 2])| {
                ((u32::from(high) << 16 | u32::from(low)) & SIGN_AND_EXPONENT).rotate_left(4 * at as u32)
            };
            let word_of = pairs.map(pair).fold(0, |word, pair| word | pair);
            word.copy_from_slice(&word_of.to_le_bytes());
        }
    }
    exceptions
}

fn exponent(weight: u16) -> u16 {
    weight >> 7 & 0xff
}

#[cfg(test)]
mod tests {
    use half::bf16;
    use proptest::prelude::*;
    use rand::{Rng, SeedableRng, rngs::StdRng};

    use super::*;

    /// As the device does it.
    fn unpack(packed: &[u8], outputs: usize, k: usize) -> Vec<u8> {
        let word = |at: usize| u32::from_le_bytes(packed[at..at + 4].try_into().unwrap());
        let half = |at: usize| u16::from_le_bytes(packed[at..at + 2].try_into().unwrap());
        let weight = |row: usize, at: usize| {
            let head = row * HEAD_BYTES;
            let group = outputs * HEAD_BYTES + (row * k + at) / GROUP * GROUP_BYTES;
            let (byte, codes) = (packed[group + at % GROUP], word(group + GROUP + at % GROUP / 8 * 4));
            let pair = codes.rotate_right(4 * (at as u32 % 8 / 2)) & SIGN_AND_EXPONENT;
            let code = (pair >> (at % 2 * 16)) as u16;
            let bytes =
                u32::from(packed[(group + at % GROUP) & !1]) | u32::from(packed[(group + at % GROUP) | 1]) << 16;
            let added = (pair + bytes).wrapping_add(word(head)) >> (at % 2 * 16);
            match (code & 0x0700, usize::from(byte)) {
                (0, 0) => code,
                (0, number) if number <= NEAR => half(head + 8 + 2 * (number - 1)),
                (0, number) => half(beyond_at(outputs, k) + 2 * (word(head + 4) as usize + number - 1 - NEAR)),
                _ => added as u16,
            }
        };
        (0..outputs * k).flat_map(|at| weight(at / k, at % k).to_le_bytes()).collect()
    }

    fn packed(plain: &[u8], k: usize) -> Option<Vec<u8>> {
        let mut packed = vec![0xaa; matrix_bytes(plain.len() / 2 / k, k)];
        pack(plain, k, &mut packed).then_some(packed)
    }

    fn normal(count: usize, deviation: f32) -> Vec<u8> {
        let mut random = StdRng::seed_from_u64(3);
        let value = |_| {
            let (u, v) = (1.0 - random.random::<f32>(), random.random::<f32>());
            bf16::from_f32((-2.0 * u.ln()).sqrt() * (v * std::f32::consts::TAU).cos() * deviation).to_le_bytes()
        };
        (0..count).flat_map(value).collect()
    }

    /// A weight would come to the device as another one.
    #[test]
    fn every_bit_comes_back() {
        for k in [32, 768, 3072] {
            for deviation in [1e-35, 0.02, 1e30] {
                let mut plain = normal(96 * k, deviation);
                plain[k * 3..k * 7].fill(0);
                plain[k * 4 + 1] = 0x80;
                assert!(unpack(&packed(&plain, k).unwrap(), 96, k) == plain, "rows of {k}, of {deviation}");
            }
        }
    }

    /// Slots would be larger than they need be.
    #[test]
    fn packed_takes_three_quarters() {
        let share = matrix_bytes(3072, 768) as f64 / (3072 * 768 * 2) as f64;
        assert!(share < 0.765, "{share}");
    }

    /// Weights would be lost that have no place.
    #[test]
    fn what_has_too_many_exceptions_is_refused() {
        let mut random = StdRng::seed_from_u64(4);
        let noise: Vec<u8> = (0..64 * 768 * 2).map(|_| random.random()).collect();
        assert_eq!(packed(&noise, 768), None);
    }

    proptest! {
        /// Any weights, infinite ones and those that are no numbers among them.
        #[test]
        fn any_bits_come_back(highest in 1_u16..256, seed: u64, rows in 1_usize..40, odd in 0.0..0.02_f64) {
            let mut random = StdRng::seed_from_u64(seed);
            let weight = |_| {
                let exponent = highest.saturating_sub(random.random_range(0..13));
                let likely = exponent << 7 | random.random::<u16>() & 0x807f;
                (if random.random_bool(odd) { random.random() } else { likely }).to_le_bytes()
            };
            let plain: Vec<u8> = (0..rows * 256).flat_map(weight).collect();
            if let Some(packed) = packed(&plain, 256) {
                prop_assert!(unpack(&packed, rows, 256) == plain);
            }
        }
    }
}
