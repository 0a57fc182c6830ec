//! How weights are stored on disk and in an expert's slot. Computation is in float32 whatever this says.
//!
//! Values stand alone, or in blocks of 32 neighbours of a row that share a scale: the formats that ggml calls Q8_0 and
//! Q4_0 (`ggml-common.h`), byte for byte. A value of a block is its integer times the scale, which float32 holds exactly.
//! Others are beside: with a fifth bit or a minimum (`fifth_bit`), of 256 values (`super_blocks`), and FP8 (`float8`). A model of
//! blocks computes, to the bit, what its values in float32 would.

use std::fmt;

use half::f16;

use crate::{
    fifth_bit::{self, q4_1, q5_0, q5_1},
    float8::{self, F8_BLOCK, F8_BYTES},
    super_blocks::{self, SUPER_BLOCK, q4_k, q5_k, q6_k},
};

/// Values of a block that share a scale.
pub const BLOCK: usize = 32;
/// Bytes of a block's scale, a binary16, which comes first.
pub const SCALE_BYTES: usize = 2;
/// Added to the integers of a Q4_0 block, so that they are none below 0.
pub const Q4_ZERO: i8 = 8;

/// How checkpoints of the supported families store weights; little-endian.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum StoredDType {
    /// IEEE 754 binary32.
    F32,
    /// The upper half of a binary32.
    BF16,
    /// IEEE 754 binary16.
    F16,
    /// Blocks of 32 values: a scale and 32 integers of 8 bits.
    Q8_0,
    /// Blocks of 32 values: a scale and 16 bytes. Byte `i` holds value `i` in its low half and value `i + 16` in its high
    /// half, each with 8 added.
    Q4_0,
    /// Blocks of 32 values in 4 bits each, with a minimum.
    Q4_1,
    /// Blocks of 32 values in 5 bits each.
    Q5_0,
    /// Blocks of 32 values in 5 bits each, with a minimum.
    Q5_1,
    /// Blocks of 256 values in 4 bits each: Q4_K.
    Q4K,
    /// Blocks of 256 values in 5 bits each: Q5_K.
    Q5K,
    /// Blocks of 256 values in 6 bits each: Q6_K.
    Q6K,
    /// Blocks of 64 values: a float32 scale and numbers of 8 bits, e4m3.
    F8,
}

impl StoredDType {
    /// All that store values in blocks.
    pub const BLOCKS: [Self; 9] =
        [Self::Q8_0, Self::Q4_0, Self::Q4_1, Self::Q5_0, Self::Q5_1, Self::Q4K, Self::Q5K, Self::Q6K, Self::F8];

    /// How many values stand together, and the bytes that they take.
    pub const fn block(self) -> (usize, usize) {
        match self {
            Self::F32 => (1, 4),
            Self::BF16 | Self::F16 => (1, 2),
            Self::Q8_0 => (BLOCK, SCALE_BYTES + BLOCK),
            Self::Q4_0 => (BLOCK, SCALE_BYTES + BLOCK / 2),
            Self::Q4_1 => (BLOCK, q4_1::BYTES),
            Self::Q5_0 => (BLOCK, q5_0::BYTES),
            Self::Q5_1 => (BLOCK, q5_1::BYTES),
            Self::Q4K => (SUPER_BLOCK, q4_k::BYTES),
            Self::Q5K => (SUPER_BLOCK, q5_k::BYTES),
            Self::Q6K => (SUPER_BLOCK, q6_k::BYTES),
            Self::F8 => (F8_BLOCK, F8_BYTES),
        }
    }

    /// Whether values share scales.
    pub fn is_blocks(self) -> bool {
        self.block().0 > 1
    }

    /// Bytes of so many values, which are whole blocks: checkpoints are refused where a row of a matrix is not.
    pub fn bytes(self, values: usize) -> usize {
        let (block_values, block_bytes) = self.block();
        values / block_values * block_bytes
    }

    /// Where a block has the binary16 numbers that its values count in. FP8 counts in a float32, and values that stand alone in
    /// none.
    pub(crate) const fn units_at(self) -> &'static [usize] {
        match self {
            Self::F32 | Self::BF16 | Self::F16 | Self::F8 => &[],
            Self::Q8_0 | Self::Q4_0 | Self::Q5_0 => &[0],
            Self::Q4_1 | Self::Q5_1 | Self::Q4K | Self::Q5K => &[0, q4_k::MIN_AT],
            Self::Q6K => &[q6_k::UNIT_AT],
        }
    }

    /// The first block that counts in something infinite or in no number, which spoils all of its values: nothing that writes
    /// models makes one.
    pub fn broken_block(self, bytes: &[u8]) -> Option<usize> {
        let is_broken = |block: &[u8]| match self {
            Self::F8 => block.first_chunk().is_some_and(|&scale| !f32::from_le_bytes(scale).is_finite()),
            _ => self.units_at().iter().any(|&at| !f16::from_le_bytes([block[at], block[at + 1]]).is_finite()),
        };
        bytes.chunks_exact(self.block().1).position(is_broken)
    }

    /// How many values so many bytes hold.
    pub fn values(self, bytes: usize) -> usize {
        let (block_values, block_bytes) = self.block();
        bytes / block_bytes * block_values
    }

    /// Appends `bytes`, values of this dtype, to `values` as float32. Every value is what it is defined to be.
    /// Ignores an incomplete value or block at the end: lengths are checked where tensors are read.
    pub fn widen_into(self, bytes: &[u8], values: &mut Vec<f32>) {
        let held = values.len();
        let count = self.values(bytes.len());
        values.resize(held + count, 0.0);
        self.widen_over(&bytes[..self.bytes(count)], &mut values[held..]);
    }

    /// As many values as `out` has room for, over what it holds. Panics unless `bytes` has exactly as many.
    pub fn widen_over(self, bytes: &[u8], out: &mut [f32]) {
        assert_eq!(bytes.len(), self.bytes(out.len()), "{self} values of another number");
        match self {
            Self::F32 => each(bytes, out, f32::from_le_bytes),
            // The upper half of a float32. As `half` does it but for signalling NaNs, and without its branch, so that a row
            // takes a tenth of the time.
            Self::BF16 => each(bytes, out, |value| f32::from_bits(u32::from(u16::from_le_bytes(value)) << 16)),
            Self::F16 => each(bytes, out, |value| f16::from_le_bytes(value).to_f32()),
            Self::Q8_0 => each_block(bytes, out, |scale, integers: &[u8; BLOCK], out| {
                out.iter_mut().zip(integers).for_each(|(out, &integer)| *out = scale * f32::from(integer as i8));
            }),
            Self::Q4_0 => each_block(bytes, out, |scale, halves: &[u8; BLOCK / 2], out| {
                let value = |half: u8| scale * f32::from(half as i8 - Q4_ZERO);
                let (low, high) = out.split_at_mut(BLOCK / 2);
                low.iter_mut().zip(halves).for_each(|(out, &byte)| *out = value(byte & 0xf));
                high.iter_mut().zip(halves).for_each(|(out, &byte)| *out = value(byte >> 4));
            }),
            Self::Q4K => whole_blocks(bytes, out, super_blocks::widen_q4_k),
            Self::Q6K => whole_blocks(bytes, out, super_blocks::widen_q6_k),
            Self::Q4_1 => whole_blocks(bytes, out, fifth_bit::widen_q4_1),
            Self::Q5_0 => whole_blocks(bytes, out, fifth_bit::widen_q5_0),
            Self::Q5_1 => whole_blocks(bytes, out, fifth_bit::widen_q5_1),
            Self::Q5K => whole_blocks(bytes, out, super_blocks::widen_q5_k),
            Self::F8 => whole_blocks(bytes, out, float8::widen),
        }
    }

    /// [`StoredDType::widen_into`] a new vector.
    pub fn widen(self, bytes: &[u8]) -> Vec<f32> {
        let mut values = Vec::new();
        self.widen_into(bytes, &mut values);
        values
    }
}

fn each<const SIZE: usize>(bytes: &[u8], out: &mut [f32], widen: impl Fn([u8; SIZE]) -> f32) {
    out.iter_mut().zip(bytes.as_chunks().0).for_each(|(out, &value)| *out = widen(value));
}

/// Calls `widen` with the scale, the rest and the room of each block. A scale that is infinite or no number makes values that
/// are none, as weights in float32 can be.
fn each_block<const REST: usize>(bytes: &[u8], out: &mut [f32], widen: impl Fn(f32, &[u8; REST], &mut [f32; BLOCK])) {
    let blocks = bytes.chunks_exact(SCALE_BYTES + REST);
    for (block, out) in blocks.zip(out.as_chunks_mut().0) {
        let (scale, rest) = block.split_first_chunk().expect("a block has a scale");
        widen(f16::from_le_bytes(*scale).to_f32(), rest.try_into().expect("and the rest"), out);
    }
}

/// Calls `widen` with each block and its room.
fn whole_blocks<const SIZE: usize, const VALUES: usize>(
    bytes: &[u8],
    out: &mut [f32],
    widen: impl Fn(&[u8; SIZE], &mut [f32; VALUES]),
) {
    bytes.as_chunks().0.iter().zip(out.as_chunks_mut().0).for_each(|(block, out)| widen(block, out));
}

impl fmt::Display for StoredDType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::F32 => "F32",
            Self::BF16 => "BF16",
            Self::F16 => "F16",
            Self::Q8_0 => "Q8_0",
            Self::Q4_0 => "Q4_0",
            Self::Q4_1 => "Q4_1",
            Self::Q5_0 => "Q5_0",
            Self::Q5_1 => "Q5_1",
            Self::Q4K => "Q4_K",
            Self::Q5K => "Q5_K",
            Self::Q6K => "Q6_K",
            Self::F8 => "F8_E4M3",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::arbitrary::blocks;

    /// A damaged file would be converted, and its model answer nothing but that its output is no number; or a whole one be refused.
    #[test]
    fn blocks_that_spoil_their_values_are_found() {
        for dtype in StoredDType::BLOCKS {
            let (values, size) = dtype.block();
            let whole = blocks(dtype, 5 * values, 3);
            assert_eq!(dtype.broken_block(&whole), None, "{dtype}");
            let with = |at: usize, changed: &[u8]| {
                let mut bytes = whole.clone();
                bytes[2 * size + at..][..changed.len()].copy_from_slice(changed);
                bytes
            };
            if dtype == StoredDType::F8 {
                for scale in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                    assert_eq!(dtype.broken_block(&with(0, &scale.to_le_bytes())), Some(2), "{scale}");
                }
                continue;
            }
            for (at, high) in (0..size).flat_map(|at| [0x7c, 0x7e, 0x7f, 0xff].map(|high| (at, high))) {
                let bytes = with(at, &[high]);
                let is_spoilt = dtype.widen(&bytes).iter().any(|value| !value.is_finite());
                assert_eq!(dtype.broken_block(&bytes), is_spoilt.then_some(2), "{dtype}, byte {at} {high:#x}");
            }
        }
        assert_eq!(StoredDType::F32.broken_block(&f32::NAN.to_le_bytes()), None);
    }
}
