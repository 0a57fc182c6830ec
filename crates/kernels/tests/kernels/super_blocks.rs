//! Values of blocks.

use candle_core::{
    Device,
    quantized::{GgmlDType, QStorage, QTensor},
};

use sida_kernels::{StoredDType, arbitrary, super_blocks::SUPER_BLOCK};

#[test]
fn values_are_those_of_another_implementation() {
    // Would break: files of others would be read as something else than they hold.
    for (dtype, candle) in [
        (StoredDType::Q8_0, GgmlDType::Q8_0),
        (StoredDType::Q4_0, GgmlDType::Q4_0),
        (StoredDType::Q4_1, GgmlDType::Q4_1),
        (StoredDType::Q5_0, GgmlDType::Q5_0),
        (StoredDType::Q5_1, GgmlDType::Q5_1),
        (StoredDType::Q4K, GgmlDType::Q4K),
        (StoredDType::Q5K, GgmlDType::Q5K),
        (StoredDType::Q6K, GgmlDType::Q6K),
    ] {
        let values = 50 * SUPER_BLOCK;
        let bytes = arbitrary::blocks(dtype, values, 3);
        let storage = QStorage::from_data(bytes.clone().into(), &Device::Cpu, candle).unwrap();
        let expected = QTensor::new(storage, values).unwrap().dequantize(&Device::Cpu).unwrap();
        let expected: Vec<u32> = expected.to_vec1::<f32>().unwrap().into_iter().map(f32::to_bits).collect();
        let found: Vec<u32> = dtype.widen(&bytes).into_iter().map(f32::to_bits).collect();
        assert!(found == expected, "{dtype}");
    }
}
