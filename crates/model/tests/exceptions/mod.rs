//! Models some of whose weights do not fit into packed experts' codes.

use std::path::Path;

/// Copies a model; of three rows of each expert's matrices ten weights become a 2^20th, and two become zero.
pub(crate) fn copy_with(from: &Path, to: &Path) {
    for file in std::fs::read_dir(from).unwrap().map(|file| file.unwrap().path()) {
        let name = file.file_name().unwrap().to_str().unwrap();
        let is_weights = name.starts_with("model") && name.ends_with(".safetensors");
        if is_weights || ["config.json", "model.safetensors.index.json"].contains(&name) {
            let mut bytes = std::fs::read(&file).unwrap();
            if is_weights {
                put(&mut bytes);
            }
            std::fs::write(to.join(name), bytes).unwrap();
        }
    }
}

fn put(file: &mut [u8]) {
    let head = usize::try_from(u64::from_le_bytes(file[..8].try_into().unwrap())).unwrap();
    let tensors: serde_json::Value = serde_json::from_slice(&file[8..8 + head]).unwrap();
    let experts = tensors.as_object().unwrap().iter().filter(|(name, _)| name.contains("expert_"));
    for (_, tensor) in experts {
        let size = match tensor["dtype"].as_str().unwrap() {
            "F32" => 4,
            "BF16" => 2,
            dtype => panic!("{dtype} is not expected"),
        };
        let first = 8 + head + tensor["data_offsets"][0].as_u64().unwrap() as usize;
        let width = tensor["shape"][1].as_u64().unwrap() as usize;
        for (row, number) in (0..3).flat_map(|row| (0..12).map(move |number| (row, number))) {
            // Sign and exponent are the uppermost bits of both.
            let end = first + (row * 7 * width + number * 9 + row + 1) * size;
            let upper = u16::from_le_bytes([file[end - 2], file[end - 1]]);
            let smaller = if number % 6 == 5 { 0 } else { upper - (20 << 7).min(upper & 0x7f80) };
            file[end - 2..end].copy_from_slice(&smaller.to_le_bytes());
        }
    }
}
