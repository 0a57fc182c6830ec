//! Values in blocks for tests, also of other crates: whatever bytes a file may hold.

use half::f16;

use crate::{StoredDType, float8::F8_SCALE_BYTES};

/// So many values in blocks of all kinds of bytes, but for scales, which are numbers of an ordinary size. The same for a seed.
pub fn blocks(dtype: StoredDType, values: usize, seed: usize) -> Vec<u8> {
    let mut state = seed as u64 + 1;
    let mut random = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as u32
    };
    let mut bytes: Vec<u8> = (0..dtype.bytes(values)).map(|_| random() as u8).collect();
    assert!(dtype.is_blocks(), "{dtype} has no blocks");
    for block in bytes.chunks_exact_mut(dtype.block().1) {
        for &at in dtype.units_at() {
            let scale = f16::from_f32((random() % 2001) as f32 / 50_000.0 - 0.02);
            block[at..at + 2].copy_from_slice(&scale.to_le_bytes());
        }
        if dtype == StoredDType::F8 {
            let scale = (random() % 2001) as f32 / 50_000.0 - 0.02;
            block[..F8_SCALE_BYTES].copy_from_slice(&scale.to_le_bytes());
        }
    }
    bytes
}
