//! Values in blocks for tests, also of other crates: whatever bytes a file may hold.

use half::f16;

use crate::{
    StoredDType::{self, F8, Q4_0, Q4_1, Q4K, Q5_0, Q5_1, Q5K, Q6K, Q8_0},
    float8::F8_SCALE_BYTES,
    super_blocks::{q4_k, q6_k},
};

/// So many values in blocks of all kinds of bytes, but for scales, which are numbers of an ordinary size. The same for a seed.
pub fn blocks(dtype: StoredDType, values: usize, seed: usize) -> Vec<u8> {
    let mut state = seed as u64 + 1;
    let mut random = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as u32
    };
    let mut bytes: Vec<u8> = (0..dtype.bytes(values)).map(|_| random() as u8).collect();
    let scales: &[usize] = match dtype {
        Q8_0 | Q4_0 | Q5_0 => &[0],
        Q4_1 | Q5_1 | Q4K | Q5K => &[0, q4_k::MIN_AT],
        Q6K => &[q6_k::UNIT_AT],
        F8 => &[],
        whole => panic!("{whole} has no blocks"),
    };
    for block in bytes.chunks_exact_mut(dtype.block().1) {
        for &at in scales {
            let scale = f16::from_f32((random() % 2001) as f32 / 50_000.0 - 0.02);
            block[at..at + 2].copy_from_slice(&scale.to_le_bytes());
        }
        if dtype == F8 {
            let scale = (random() % 2001) as f32 / 50_000.0 - 0.02;
            block[..F8_SCALE_BYTES].copy_from_slice(&scale.to_le_bytes());
        }
    }
    bytes
}
