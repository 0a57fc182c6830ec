//! How values become blocks that share a scale (see [`sida_kernels::dtype`]), and which tensors of a model do: what
//! `sida convert` and `sida synth` write with fewer bits. Nothing here is called when a model is served.

use std::{
    array,
    io::{self, Write},
};

use half::f16;
use rayon::prelude::*;
use serde_json::Value;
use sida_kernels::{
    dtype::{BLOCK, Q4_ZERO},
    fifth_bit,
};

use crate::{
    ModelError, StoredDType,
    config::{QUANTIZATION, quantization},
    names,
    shards::TensorSpec,
};

/// The formats that blocks are made in. Others are read only.
const MADE: [StoredDType; 2] = [StoredDType::Q8_0, StoredDType::Q4_0];
/// Values that become blocks at a time.
const CHUNK_VALUES: usize = if cfg!(test) { 4 * PIECE_VALUES } else { 4 << 20 };
/// Values that one thread makes blocks of at a time.
const PIECE_VALUES: usize = 64 << 10;
/// What the value farthest from 0 may become in a Q4_0 block: -8, or a little less or more, with the values beyond cut. One
/// of these is best for the block as a whole.
const Q4_EXTREMES: [f32; 6] = [-8.0, -7.5, -7.0, -6.5, -8.5, 7.0];
/// The same of a Q8_0 block.
const Q8_EXTREMES: [f32; 1] = [127.0];

/// Which weights of a model are written in blocks; the others stay what they are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockFormats {
    /// The matrices of the experts.
    pub experts: Option<StoredDType>,
    /// The other matrices, without those of routers, which decide more than they weigh.
    pub dense: Option<StoredDType>,
}

impl BlockFormats {
    /// Nothing is.
    pub const NONE: Self = Self { experts: None, dense: None };

    /// Whether anything is.
    pub fn is_any(&self) -> bool {
        *self != Self::NONE
    }

    /// Has the config of a model say that some of it is, for those who would not know.
    pub(crate) fn tell(&self, config: &mut Value) {
        if let (true, Some(config)) = (self.is_any(), config.as_object_mut()) {
            config.insert(QUANTIZATION.to_owned(), quantization());
        }
    }

    /// A tensor as it is to be written.
    pub(crate) fn applied(&self, spec: &TensorSpec) -> Result<TensorSpec, ModelError> {
        let TensorSpec { name, dtype, shape } = spec;
        let is_matrix = shape.len() > 1 && !names::is_position_bias(name);
        let wanted = match () {
            () if names::is_expert(name) => self.experts,
            () if is_matrix && !names::is_router(name) => self.dense,
            () => None,
        };
        let Some(blocks) = wanted else { return Ok(spec.clone()) };
        let refuse = |expected: &str, found| {
            Err(ModelError::TensorDType { tensor: name.clone(), expected: expected.to_owned(), found })
        };
        if dtype.is_blocks() {
            return refuse("F32, BF16 or F16: blocks are made of whole values", dtype.to_string());
        }
        match shape.last() {
            Some(inputs) if inputs.is_multiple_of(BLOCK) => Ok(TensorSpec { dtype: blocks, ..spec.clone() }),
            _ => refuse(&format!("rows of whole blocks of {BLOCK} values"), format!("{dtype} {shape:?}")),
        }
    }
}

/// Takes the bytes of a tensor in one dtype, and writes them in another, in bounded memory.
struct BlockWriter<'w> {
    from: StoredDType,
    spec: &'w TensorSpec,
    /// A chunk at most.
    held: Vec<u8>,
    out: &'w mut dyn Write,
}

/// Writes a tensor, whose bytes in `from` `fill` writes, as `spec` says.
pub(crate) fn write(
    from: StoredDType,
    spec: &TensorSpec,
    out: &mut dyn Write,
    fill: impl FnOnce(&mut dyn Write) -> io::Result<()>,
) -> io::Result<()> {
    if from == spec.dtype {
        return fill(out);
    }
    let mut writer = BlockWriter { from, spec, held: Vec::new(), out };
    fill(&mut writer)?;
    writer.pass_on()
}

impl BlockWriter<'_> {
    /// Writes what is held.
    fn pass_on(&mut self) -> io::Result<()> {
        let TensorSpec { name, dtype, .. } = self.spec;
        let refused = || io::Error::other(ModelError::NotBlocks { tensor: name.clone(), dtype: *dtype });
        let blocks = quantized(&self.from.widen(&self.held), *dtype).ok_or_else(refused)?;
        self.held.clear();
        self.out.write_all(&blocks)
    }
}

impl Write for BlockWriter<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let chunk = self.from.bytes(CHUNK_VALUES);
        let taken = bytes.len().min(chunk - self.held.len());
        self.held.extend_from_slice(&bytes[..taken]);
        if self.held.len() == chunk {
            self.pass_on()?;
        }
        Ok(taken)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}

/// The blocks of so many values, which are whole blocks; on all threads. `None` where a value is none, or too large for a
/// scale. Panics unless `to` is one of [`MADE`].
pub fn quantized(values: &[f32], to: StoredDType) -> Option<Vec<u8>> {
    assert!(MADE.contains(&to) && values.len().is_multiple_of(BLOCK), "{} values as {to}", values.len());
    let mut blocks = vec![0; to.bytes(values.len())];
    let pieces = blocks.par_chunks_mut(to.bytes(PIECE_VALUES)).zip(values.par_chunks(PIECE_VALUES));
    let is_whole = pieces.map(|(blocks, values)| {
        let pairs = blocks.chunks_exact_mut(to.bytes(BLOCK)).zip(values.as_chunks().0);
        pairs.map(|(block, values)| write_block(values, to, block)).collect::<Option<Vec<()>>>()
    });
    is_whole.collect::<Option<Vec<_>>>().map(|_| blocks)
}

fn write_block(values: &[f32; BLOCK], to: StoredDType, block: &mut [u8]) -> Option<()> {
    if values.iter().any(|value| !value.is_finite()) {
        return None;
    }
    let extreme = values.iter().copied().reduce(|a, b| if b.abs() > a.abs() { b } else { a })?;
    let (range, extremes) = match to {
        StoredDType::Q4_0 => ((-f32::from(Q4_ZERO), f32::from(Q4_ZERO - 1)), &Q4_EXTREMES[..]),
        _ => ((-f32::from(i8::MAX), f32::from(i8::MAX)), &Q8_EXTREMES[..]),
    };
    let tried = extremes.iter().map(|to| fitted(values, extreme / to, range));
    let (_, scale) = tried.max_by(|(a, _), (b, _)| a.total_cmp(b))?;
    let scale = Some(f16::from_f32(scale)).filter(|scale| scale.is_finite())?;
    // For the scale as it is kept, so that what rounding it does is made up for.
    let integers = integers(values, scale.to_f32(), range).map(|integer| integer as i8);
    put(scale, integers, to, block);
    Some(())
}

/// Writes a block that is known. Panics unless `to` is one of [`MADE`] or Q5_0, and `block` as long as one of these; integers of
/// Q4_0 are -8 to 7, of Q5_0 -16 to 15.
pub(crate) fn put(scale: f16, integers: [i8; BLOCK], to: StoredDType, block: &mut [u8]) {
    assert!(
        (MADE.contains(&to) || to == StoredDType::Q5_0) && block.len() == to.bytes(BLOCK),
        "a block of {to} in {} bytes",
        block.len()
    );
    let (to_scale, rest) = block.split_first_chunk_mut().expect("a block has a scale");
    *to_scale = scale.to_le_bytes();
    if to == StoredDType::Q5_0 {
        fifth_bit::put_q5_0(integers, rest);
    } else if to == StoredDType::Q4_0 {
        let half = |integer: i8| (integer + Q4_ZERO) as u8;
        let (low, high) = integers.split_at(BLOCK / 2);
        let pairs = low.iter().zip(high).map(|(&low, &high)| half(low) | half(high) << 4);
        rest.iter_mut().zip(pairs).for_each(|(to, byte)| *to = byte);
    } else {
        rest.iter_mut().zip(integers).for_each(|(to, integer)| *to = integer as u8);
    }
}

/// The scale that is best (least squares) for the integers that values would be at about this one; and how much of their
/// squares is then right.
fn fitted(values: &[f32; BLOCK], scale: f32, range: (f32, f32)) -> (f32, f32) {
    let integers = integers(values, scale, range);
    let squares = sum(integers.map(|integer| integer * integer));
    let products = sum(array::from_fn(|i| integers[i] * values[i]));
    if squares > 0.0 { (products * (products / squares), products / squares) } else { (0.0, 0.0) }
}

/// The nearest integers to values over their scale, within a range.
fn integers(values: &[f32; BLOCK], scale: f32, (min, max): (f32, f32)) -> [f32; BLOCK] {
    // Added and taken off again, it leaves the nearest integer, in two instructions.
    const TO_INTEGER: f32 = 12_582_912.0;
    // A scale that is too small to be divided by is none.
    let inverse = Some(scale.recip()).filter(|inverse| inverse.is_finite()).unwrap_or(0.0);
    values.map(|value| (value * inverse).max(min).min(max) + TO_INTEGER - TO_INTEGER)
}

/// By halves, which compilers do with vectors.
fn sum(mut values: [f32; BLOCK]) -> f32 {
    let mut half = BLOCK / 2;
    while half > 0 {
        for i in 0..half {
            values[i] += values[i + half];
        }
        half /= 2;
    }
    values[0]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn values(n: usize, scale: f32) -> Vec<f32> {
        (0..n).map(|i| (((i * 7919 + 13) % 1009) as f32 / 504.0 - 1.0) * scale).collect()
    }

    /// Weights would be far from what they were, or in each other's place.
    #[test]
    fn blocks_are_near_their_values() {
        // For a step of 1/127 and of 1/8, what is wrong is evenly spread over it.
        for (format, deviation) in [(StoredDType::Q8_0, 0.0025), (StoredDType::Q4_0, 0.037)] {
            for scale in [0.005, 0.02, 1.0, 300.0] {
                let values = values(BLOCK * 40, scale);
                let blocks = quantized(&values, format).unwrap();
                assert_eq!(blocks.len(), format.bytes(values.len()));
                let wrong: Vec<f32> = values.iter().zip(format.widen(&blocks)).map(|(a, b)| (a - b) / scale).collect();
                let found = (wrong.iter().map(|wrong| wrong * wrong).sum::<f32>() / wrong.len() as f32).sqrt();
                assert!(found < deviation, "{format} {scale}: {found}");
                assert!(wrong.iter().all(|wrong| wrong.abs() < 5.0 * deviation), "{format} {scale}");
            }
        }
    }

    /// What a block holds exactly would change when it is written again.
    #[test]
    fn what_blocks_can_say_is_kept() {
        for (format, min, max) in [(StoredDType::Q8_0, -127, 127), (StoredDType::Q4_0, -8, 7)] {
            let integers = (0..BLOCK as i32).map(|i| min + i * (max - min) / (BLOCK as i32 - 1));
            let values: Vec<f32> = integers.map(|integer| integer as f32 * 0.25).collect();
            assert_eq!(format.widen(&quantized(&values, format).unwrap()), values, "{format}");
            assert_eq!(format.widen(&quantized(&[0.0; BLOCK], format).unwrap()), [0.0; BLOCK]);
        }
    }

    /// A weight that is none, or does not fit, would become another without a word.
    #[test]
    fn refuses_what_blocks_cannot_say() {
        for bad in [f32::NAN, f32::INFINITY, 1e38] {
            let mut values = values(BLOCK, 1.0);
            values[7] = bad;
            for format in MADE {
                assert_eq!(quantized(&values, format), None, "{format}: {bad}");
            }
        }
    }

    /// What is written in pieces, or in one that is longer than what is held, would not be what is made at once; or it would
    /// not be told which tensor cannot be written.
    #[test]
    fn pieces_are_joined() {
        let mut values = values(CHUNK_VALUES + BLOCK * 9, 1.0);
        let spec = TensorSpec { name: "w".to_owned(), dtype: StoredDType::Q4_0, shape: vec![values.len()] };
        let written = |values: &[f32], piece: usize| {
            let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
            let mut out = Vec::new();
            let fill = |out: &mut dyn Write| bytes.chunks(piece).try_for_each(|piece| out.write_all(piece));
            write(StoredDType::F32, &spec, &mut out, fill).map(|()| out)
        };
        let expected = quantized(&values, spec.dtype).unwrap();
        for piece in [100_003, usize::MAX] {
            assert!(written(&values, piece).unwrap() == expected, "pieces of {piece}");
        }
        values[CHUNK_VALUES + 1] = f32::NAN;
        let error = written(&values, 1 << 16).unwrap_err().to_string();
        assert!(error.contains("tensor w holds"), "{error}");
    }
}
