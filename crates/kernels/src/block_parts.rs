//! Blocks taken apart: the integers of 32 neighbours and what makes weights of them, for who lays them out otherwise, as a GPU does.

use crate::{
    dtype::{BLOCK, StoredDType},
    fifth_bit::{q4_1, q5_0, q5_1},
    float8::F8_SCALE_BYTES,
    super_blocks::{PART, q4_k, q4_k_scales, q5_k, q6_k, q6_k_bits},
};

/// Neighbours whose integers are in a word of [`Part::eights`].
const EIGHT: usize = 8;

/// 32 neighbours of a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Part {
    /// Their integers, a byte each, the first of eight lowest: as the block has them, none below 0. Of FP8 the codes.
    pub eights: [u64; BLOCK / EIGHT],
    /// What is theirs alone, as [`of`] says; the rest is 0.
    pub own: [u8; 4],
}

/// Part `at` of a block, and what is left of it for all of its parts:
///
/// | format | own | shared |
/// |---|---|---|
/// | Q4_1, Q5_1 | scale, what is added: binary16 | |
/// | Q4_0, Q8_0, Q5_0 | scale: binary16 | |
/// | Q4_K, Q5_K | scale, what is taken off: a byte each | what these count in: binary16 |
/// | Q6_K | scale of the first 16, of the others: a signed byte each | what these count in: binary16 |
/// | FP8 | | scale: float32 |
///
/// Panics unless `block` is one of a format in blocks, which has such a part.
#[inline(always)]
pub fn of(dtype: StoredDType, block: &[u8], at: usize) -> (Part, &[u8]) {
    assert_eq!(block.len(), dtype.block().1, "a block of {dtype}");
    assert!((at + 1) * PART <= dtype.block().0, "a block of {dtype} has no part {at}");
    let own = |bytes: &[u8]| std::array::from_fn(|i| bytes.get(i).copied().unwrap_or(0));
    // Halves of 16 bytes: the low ones are values 0 to 15.
    let halves = |from: usize, i: usize| halves_of(eight_at(block, from + i % 2 * EIGHT), i / 2);
    let with_fifths = |from: usize, fifths: usize, i: usize| halves(from, i) | bits_of(block[fifths + i]) << 4;
    match dtype {
        StoredDType::Q4_0 => (part(own(&block[..2]), |i| halves(2, i)), &[]),
        StoredDType::Q8_0 => (part(own(&block[..2]), |i| eight_at(block, 2 + i * EIGHT)), &[]),
        StoredDType::Q4_1 => (part(own(&block[..4]), |i| halves(q4_1::HALVES_AT, i)), &[]),
        StoredDType::Q5_0 => (part(own(&block[..2]), |i| with_fifths(q5_0::HALVES_AT, q5_0::FIFTHS_AT, i)), &[]),
        StoredDType::Q5_1 => (part(own(&block[..4]), |i| with_fifths(q5_1::HALVES_AT, q5_1::FIFTHS_AT, i)), &[]),
        StoredDType::Q4K => {
            let halves = |i| halves_of(eight_at(block, q4_k::HALVES_AT + at / 2 * PART + i * EIGHT), at % 2);
            (part(own(&scales_of(block, at)), halves), &block[..q4_k::SCALES_AT])
        }
        StoredDType::Q5K => {
            let halves = |i| halves_of(eight_at(block, q5_k::HALVES_AT + at / 2 * PART + i * EIGHT), at % 2);
            let fifths = |i| eight_at(block, q5_k::FIFTHS_AT + i * EIGHT) >> at & EACH;
            (part(own(&scales_of(block, at)), |i| halves(i) | fifths(i) << 4), &block[..q4_k::SCALES_AT])
        }
        StoredDType::Q6K => {
            let (low_at, high_at, shift) = q6_k_bits(at / 2);
            let low = |i| eight_at(block, low_at + at % 2 * PART + i * EIGHT) >> shift & (EACH * 0xf);
            let high = |i| eight_at(block, high_at + i * EIGHT) >> shift >> (at % 2 * 2) & (EACH * 3);
            let own = own(&block[q6_k::SCALES_AT + at * 2..][..2]);
            (part(own, |i| low(i) | high(i) << 4), &block[q6_k::UNIT_AT..])
        }
        StoredDType::F8 => {
            let (scale, codes) = block.split_at(F8_SCALE_BYTES);
            (part([0; 4], |i| eight_at(codes, at * PART + i * EIGHT)), scale)
        }
        StoredDType::F32 | StoredDType::BF16 | StoredDType::F16 => panic!("{dtype} has no blocks"),
    }
}

fn part(own: [u8; 4], eight: impl Fn(usize) -> u64) -> Part {
    Part { eights: std::array::from_fn(eight), own }
}

/// The lowest bit of each byte.
const EACH: u64 = 0x0101_0101_0101_0101;

fn eight_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + EIGHT].try_into().expect("8 bytes"))
}

/// The low or the high halves of bytes.
fn halves_of(bytes: u64, half: usize) -> u64 {
    bytes >> (half * 4) & (EACH * 0xf)
}

/// Each bit in a byte of its own.
fn bits_of(bits: u8) -> u64 {
    let four = |bits: u8| (u32::from(bits & 0xf) * 0x0020_4081) & 0x0101_0101;
    u64::from(four(bits)) | u64::from(four(bits >> 4)) << 32
}

/// Scale and what is taken off, of a part of a Q4_K or Q5_K super-block.
fn scales_of(block: &[u8], at: usize) -> [u8; 2] {
    let scales = std::array::from_fn(|i| block[q4_k::SCALES_AT + i]);
    q4_k_scales(scales).map(|all| all.to_le_bytes()[at])
}

#[cfg(test)]
mod tests {
    use half::f16;

    use super::*;
    use crate::{arbitrary, dtype::Q4_ZERO, float8};

    /// What is added to the integers of a format, so that they are none below 0. Those of Q8_0 are signed bytes.
    fn zero(dtype: StoredDType) -> i8 {
        match dtype {
            StoredDType::Q4_0 => Q4_ZERO,
            StoredDType::Q5_0 => q5_0::ZERO,
            StoredDType::Q6K => q6_k::ZERO,
            _ => 0,
        }
    }

    /// A device would multiply by other weights than the processor.
    #[test]
    fn parts_make_the_values_of_their_blocks() {
        for dtype in StoredDType::BLOCKS {
            let (values, size) = dtype.block();
            for (number, block) in arbitrary::blocks(dtype, 20 * values, 5).chunks(size).enumerate() {
                let expected = dtype.widen(block);
                for (at, expected) in expected.chunks(PART).enumerate() {
                    let (part, shared) = of(dtype, block, at);
                    let half = |bytes: &[u8]| f16::from_le_bytes([bytes[0], bytes[1]]).to_f32();
                    let integers = part.eights.iter().flat_map(|eight| eight.to_le_bytes());
                    let found: Vec<f32> = integers
                        .enumerate()
                        .map(|(i, code)| {
                            let integer = f32::from(i16::from(code) - i16::from(zero(dtype)));
                            match dtype {
                                StoredDType::Q8_0 => f32::from(code as i8) * half(&part.own),
                                StoredDType::Q4_0 | StoredDType::Q5_0 => integer * half(&part.own),
                                StoredDType::Q4_1 | StoredDType::Q5_1 => {
                                    integer * half(&part.own) + half(&part.own[2..])
                                }
                                StoredDType::Q4K | StoredDType::Q5K => {
                                    integer * (half(shared) * f32::from(part.own[0]))
                                        - half(&shared[2..]) * f32::from(part.own[1])
                                }
                                StoredDType::Q6K => integer * (half(shared) * f32::from(part.own[i / 16] as i8)),
                                _ => float8::number(code) * f32::from_le_bytes(shared.try_into().unwrap()),
                            }
                        })
                        .collect();
                    assert_eq!(found, expected, "{dtype}, block {number}, part {at}");
                }
            }
        }
    }
}
