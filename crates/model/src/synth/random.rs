//! Seeded normal values at the speed of a disk. A counter goes through a mixing function (splitmix64), so
//! any piece of any tensor can be made by any thread; 12 bits of the result pick one of 4,096 quantiles of
//! the normal distribution, which is finer than bf16 can tell apart near the middle and ends at 3.7 standard
//! deviations.

use std::io::{self, Write};

use half::bf16;
use rayon::prelude::*;

/// Bytes that one thread makes at a time, each from a seed of its own.
const CHUNK_BYTES: usize = 1 << 20;
/// Chunks that are made before they are written.
const CHUNKS_PER_WRITE: usize = 8;
const QUANTILES: usize = 4096;
/// splitmix64's increment: 2^64 divided by the golden ratio.
const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;

/// Where a stream of values starts.
#[derive(Clone, Copy)]
pub(super) struct StreamSeed(u64);

impl StreamSeed {
    /// The stream of a tensor.
    pub(super) fn new(seed: u64, name: &str) -> Self {
        name.bytes().fold(Self(mix(seed)), |stream, byte| stream.child(byte.into()))
    }

    /// The n-th of the streams that start from this one.
    pub(super) fn child(self, n: u64) -> Self {
        Self(mix(self.0 ^ mix(n.wrapping_add(1).wrapping_mul(GOLDEN))))
    }

    /// 64 random bits.
    #[inline(always)]
    fn at(self, n: u64) -> u64 {
        mix(self.0.wrapping_add(n.wrapping_mul(GOLDEN)))
    }
}

/// splitmix64's output function.
#[inline(always)]
fn mix(mut bits: u64) -> u64 {
    bits = (bits ^ (bits >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    bits = (bits ^ (bits >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    bits ^ (bits >> 31)
}

/// A permutation that depends on nothing but the stream (Fisher-Yates).
pub(super) fn shuffled<T>(stream: StreamSeed, mut items: Vec<T>) -> Vec<T> {
    for last in (1..items.len()).rev() {
        items.swap(last, (stream.at(last as u64) % (last as u64 + 1)) as usize);
    }
    items
}

/// What a value has to do with the one before it.
#[derive(Clone, Copy)]
pub(super) enum Signs {
    /// Nothing.
    Free,
    /// Every other value is the negative of the one before it, so that a row's sum is 0.
    Paired,
}

/// The standard normal distribution.
pub(super) struct Normal {
    /// The middles of `QUANTILES` equally likely intervals, ascending.
    quantiles: Vec<f64>,
}

impl Normal {
    pub(super) fn new() -> Self {
        /// The density is summed in steps this wide.
        const STEP: f64 = 1.0 / 4096.0;
        const END: f64 = 9.0;
        let density = |x: f64| (-0.5 * x * x).exp() * 0.398_942_280_401_432_7;
        let mut quantiles = Vec::with_capacity(QUANTILES);
        let (mut x, mut below) = (-END, 0.0);
        while quantiles.len() < QUANTILES && x < END {
            let mass = density(x + STEP / 2.0) * STEP;
            while quantiles.len() < QUANTILES {
                let wanted = (quantiles.len() as f64 + 0.5) / QUANTILES as f64;
                if wanted > below + mass {
                    break;
                }
                quantiles.push(x + STEP * (wanted - below) / mass);
            }
            (x, below) = (x + STEP, below + mass);
        }
        Self { quantiles }
    }

    /// `len` values of a stream.
    pub(super) fn values(&self, stream: StreamSeed, len: usize) -> Vec<f64> {
        (0..len as u64).map(|n| self.quantiles[stream.at(n) as usize % QUANTILES]).collect()
    }

    /// Writes `bytes` bytes of bf16 values with a standard deviation.
    pub(super) fn write_bf16(
        &self,
        stream: StreamSeed,
        deviation: f64,
        signs: Signs,
        bytes: u64,
        file: &mut dyn Write,
    ) -> io::Result<()> {
        let table: [u16; QUANTILES] =
            std::array::from_fn(|index| bf16::from_f64(self.quantiles[index] * deviation).to_bits());
        let mut buffer = vec![0; (CHUNK_BYTES * CHUNKS_PER_WRITE).min(bytes as usize)];
        let mut done = 0;
        while done < bytes {
            let len = (bytes - done).min(buffer.len() as u64) as usize;
            let first = done / CHUNK_BYTES as u64;
            (buffer[..len].par_chunks_mut(CHUNK_BYTES).enumerate())
                .for_each(|(chunk, bytes)| fill(stream.child(first + chunk as u64), &table, signs, bytes));
            file.write_all(&buffer[..len])?;
            done += len as u64;
        }
        Ok(())
    }
}

/// Four values from each 64 random bits, or two and their negatives.
fn fill(stream: StreamSeed, table: &[u16; QUANTILES], signs: Signs, bytes: &mut [u8]) {
    const SIGN: u64 = 0x8000;
    let four = |n: u64| {
        let bits = stream.at(n);
        let value = |at: u32| u64::from(table[(bits >> at) as usize % QUANTILES]);
        let [a, c] = [value(0), value(32)];
        let [b, d] = match signs {
            Signs::Free => [value(16), value(48)],
            Signs::Paired => [a ^ SIGN, c ^ SIGN],
        };
        (a | b << 16 | c << 32 | d << 48).to_le_bytes()
    };
    let (whole, rest) = bytes.as_chunks_mut::<8>();
    for (n, chunk) in whole.iter_mut().enumerate() {
        *chunk = four(n as u64);
    }
    let last = four(whole.len() as u64);
    rest.copy_from_slice(&last[..rest.len()]);
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Weights would not have the scale that keeps activations finite.
    #[test]
    fn values_are_normal() {
        let normal = Normal::new();
        assert_eq!(normal.quantiles.len(), QUANTILES);
        assert!((normal.quantiles[QUANTILES * 39 / 40] - 1.96).abs() < 0.01);
        let mut bytes = Vec::new();
        normal.write_bf16(StreamSeed::new(1, "a"), 0.5, Signs::Free, 400_000, &mut bytes).unwrap();
        let values: Vec<f64> = bytes.as_chunks().0.iter().map(|&value| bf16::from_le_bytes(value).to_f64()).collect();
        let mean = values.iter().sum::<f64>() / values.len() as f64;
        let deviation = (values.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / values.len() as f64).sqrt();
        assert!(mean.abs() < 0.005 && (deviation - 0.5).abs() < 0.005, "mean {mean}, deviation {deviation}");
    }

    /// What relu lets through would have a mean, which skews every router after it.
    #[test]
    fn pairs_cancel() {
        let mut bytes = Vec::new();
        Normal::new().write_bf16(StreamSeed::new(1, "a"), 1.0, Signs::Paired, 1002 * 2, &mut bytes).unwrap();
        let values: Vec<f32> = bytes.as_chunks().0.iter().map(|&value| bf16::from_le_bytes(value).to_f32()).collect();
        assert!(values.as_chunks::<2>().0.iter().all(|[a, b]| *a == -b && *a != 0.0));
    }

    /// The bytes of a seed would depend on how a tensor is cut into pieces, or tensors would be alike.
    #[test]
    fn streams_are_their_own() {
        let normal = Normal::new();
        let bytes = |seed, name| {
            let mut bytes = Vec::new();
            normal
                .write_bf16(StreamSeed::new(seed, name), 1.0, Signs::Free, 3 * CHUNK_BYTES as u64 + 6, &mut bytes)
                .unwrap();
            bytes
        };
        let a = bytes(1, "a");
        assert_eq!(a, bytes(1, "a"));
        assert_ne!(a, bytes(2, "a"));
        assert_ne!(a, bytes(1, "b"));
        assert_ne!(a[..CHUNK_BYTES], a[CHUNK_BYTES..2 * CHUNK_BYTES]);
    }
}
