//! Products: every element is the same dot product, whatever is beside it.

use half::{bf16, f16};
use sida_kernels::{
    StoredDType, arbitrary,
    lanes::dot,
    matmul::{MatrixRef, matmul},
};

use crate::each_kind;

fn values(n: usize, seed: usize) -> Vec<f32> {
    (0..n).map(|i| ((i * 7919 + seed * 104_729) % 1009) as f32 / 504.0 - 1.0).collect()
}

/// The product by vectors of every kind.
fn by_each_kind(x: &[f32], n: usize, w: MatrixRef<'_>) -> Vec<Vec<f32>> {
    each_kind(|| {
        let mut out = vec![f32::NAN; n * w.rows];
        matmul(x, w, &mut out);
        out
    })
}

/// A model of blocks would compute something else than its values in float32 would.
#[test]
fn blocks_are_their_values() {
    for (n, blocks, m) in [(1, 1, 1), (1, 2, 301), (2, 3, 7), (3, 4, 40), (4, 1, 65), (9, 8, 33), (70, 2, 50)] {
        for dtype in StoredDType::BLOCKS {
            let k = blocks * dtype.block().0;
            let (x, bytes) = (values(n * k, 7), arbitrary::blocks(dtype, m * k, 8));
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

/// A row would have other bits on a machine with other vectors, in tall tiles or in short ones.
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
