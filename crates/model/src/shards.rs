//! Writes tensors as safetensors: one `model.safetensors`, or shards with an index when there is more than
//! a shard's worth. The sizes of all tensors are known first, so headers are written before data and data
//! streams through. Called by [`crate::convert`] and [`crate::synth`].

use std::{
    fs::{self, File},
    io::{self, BufWriter, Write},
    path::{Path, PathBuf},
};

use serde_json::{Map, Value, json};

use crate::{ModelError, StoredDType, safetensors_dtype};

/// Bytes of tensors per shard, at most; a larger tensor has a shard to itself.
pub(crate) const SHARD_BYTES_MAX: u64 = 4_000_000_000;
/// Data goes to the file in pieces of this size.
const BUFFER_BYTES: usize = 1 << 20;

/// What the metadata of a safetensors file calls the format of a tensor that is stored in blocks.
pub(crate) fn blocks_key(tensor: &str) -> String {
    format!("blocks.{tensor}")
}

/// A tensor that will be written.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct TensorSpec {
    pub(crate) name: String,
    pub(crate) dtype: StoredDType,
    /// In values, whatever they are stored in.
    pub(crate) shape: Vec<usize>,
}

impl TensorSpec {
    /// Bytes of its data.
    pub(crate) fn bytes(&self) -> u64 {
        self.dtype.bytes(self.shape.iter().product()) as u64
    }
}

/// Writes all of `specs` into `dir`, at most `shard_bytes_max` per file. `fill` writes the data of one
/// tensor, little-endian and row-major, exactly [`TensorSpec::bytes`] of it.
pub(crate) fn write(
    dir: &Path,
    specs: &[TensorSpec],
    shard_bytes_max: u64,
    fill: &mut dyn FnMut(&TensorSpec, &mut dyn Write) -> io::Result<()>,
) -> Result<(), ModelError> {
    let shards = cut(specs, shard_bytes_max);
    let mut weight_map = Map::new();
    for (number, shard) in shards.iter().enumerate() {
        let name = match shards.len() {
            1 => "model.safetensors".to_owned(),
            count => format!("model-{:05}-of-{count:05}.safetensors", number + 1),
        };
        let path = dir.join(&name);
        write_shard(&path, shard, fill).map_err(|source| ModelError::Write { path, source })?;
        weight_map.extend(shard.iter().map(|spec| (spec.name.clone(), Value::from(name.as_str()))));
    }
    if shards.len() == 1 {
        return Ok(());
    }
    let total: u64 = specs.iter().map(TensorSpec::bytes).sum();
    let index = json!({"metadata": {"total_size": total}, "weight_map": weight_map});
    write_json(dir.join("model.safetensors.index.json"), &index)
}

/// Writes a small JSON file.
pub(crate) fn write_json(path: PathBuf, value: &Value) -> Result<(), ModelError> {
    fs::write(&path, format!("{value:#}\n")).map_err(|source| ModelError::Write { path, source })
}

/// Cuts the tensors into shards in the order given. Wider values come first within a shard, and
/// blocks last, so that every tensor is aligned to its values.
fn cut(specs: &[TensorSpec], shard_bytes_max: u64) -> Vec<Vec<&TensorSpec>> {
    let mut shards: Vec<Vec<&TensorSpec>> = vec![Vec::new()];
    let mut bytes = 0;
    for spec in specs {
        if bytes + spec.bytes() > shard_bytes_max && bytes > 0 {
            shards.push(Vec::new());
            bytes = 0;
        }
        bytes += spec.bytes();
        shards.last_mut().expect("never empty").push(spec);
    }
    for shard in &mut shards {
        shard.sort_by_key(|spec| (spec.dtype.is_blocks(), std::cmp::Reverse(spec.dtype.block().1)));
    }
    shards
}

fn write_shard(
    path: &Path,
    specs: &[&TensorSpec],
    fill: &mut dyn FnMut(&TensorSpec, &mut dyn Write) -> io::Result<()>,
) -> io::Result<()> {
    let mut file = Counted { inner: BufWriter::with_capacity(BUFFER_BYTES, File::create_new(path)?), bytes: 0 };
    let header = header(specs);
    file.write_all(&(header.len() as u64).to_le_bytes())?;
    file.write_all(&header)?;
    for spec in specs {
        let end = file.bytes + spec.bytes();
        fill(spec, &mut file)?;
        if file.bytes != end {
            return Err(io::Error::other(format!("tensor {} was not filled exactly", spec.name)));
        }
    }
    file.flush()
}

/// The JSON header, padded with spaces so that the data starts at a multiple of 8.
fn header(specs: &[&TensorSpec]) -> Vec<u8> {
    let mut tensors = Map::new();
    let mut metadata = Map::new();
    metadata.insert("format".to_owned(), "pt".into());
    let mut start = 0;
    for spec in specs {
        let end = start + spec.bytes();
        let mut shape = spec.shape.clone();
        if spec.dtype.is_blocks() {
            // Which safetensors has no dtype for: they are bytes, and the metadata says of what.
            metadata.insert(blocks_key(&spec.name), spec.dtype.to_string().into());
            shape.last_mut().into_iter().for_each(|inputs| *inputs = spec.dtype.bytes(*inputs));
        }
        let dtype = format!("{:?}", safetensors_dtype::in_safetensors(spec.dtype));
        let entry = json!({"dtype": dtype, "shape": shape, "data_offsets": [start, end]});
        tensors.insert(spec.name.clone(), entry);
        start = end;
    }
    tensors.insert("__metadata__".to_owned(), metadata.into());
    let mut header = Value::Object(tensors).to_string().into_bytes();
    header.resize(header.len().next_multiple_of(8), b' ');
    header
}

/// Counts what is written.
struct Counted<W> {
    inner: W,
    bytes: u64,
}

impl<W: Write> Write for Counted<W> {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        let written = self.inner.write(buffer)?;
        self.bytes += written as u64;
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

#[cfg(test)]
mod tests {
    use safetensors::SafeTensors;

    use super::*;

    fn spec(name: &str, dtype: StoredDType, shape: &[usize]) -> TensorSpec {
        TensorSpec { name: name.to_owned(), dtype, shape: shape.to_vec() }
    }

    fn fill_with_name(spec: &TensorSpec, out: &mut dyn Write) -> io::Result<()> {
        out.write_all(&vec![spec.name.as_bytes()[0]; spec.bytes() as usize])
    }

    /// What is written would not be what the safetensors library reads.
    #[test]
    fn writes_shards_that_the_library_reads() {
        let specs = [
            spec("a", StoredDType::BF16, &[3]),
            spec("b", StoredDType::F32, &[2, 2]),
            spec("c", StoredDType::F16, &[40]),
        ];
        for (limit, files) in [(1000, 1), (30, 2), (1, 3)] {
            let dir = tempfile::tempdir().unwrap();
            write(dir.path(), &specs, limit, &mut fill_with_name).unwrap();
            let mut found = Vec::new();
            let mut shards = 0;
            for entry in fs::read_dir(dir.path()).unwrap() {
                let path = entry.unwrap().path();
                if path.extension().is_some_and(|extension| extension == "safetensors") {
                    shards += 1;
                    let bytes = fs::read(path).unwrap();
                    for (name, view) in SafeTensors::deserialize(&bytes).unwrap().tensors() {
                        assert!(view.data().iter().all(|&byte| byte == name.as_bytes()[0]));
                        found.push((name, view.shape().to_vec()));
                    }
                }
            }
            found.sort();
            assert_eq!(found, [("a".into(), vec![3]), ("b".into(), vec![2, 2]), ("c".into(), vec![40])]);
            assert_eq!(shards, files);
            assert_eq!(dir.path().join("model.safetensors.index.json").exists(), files > 1);
        }
    }

    /// A tensor that is too short would shift all that follow it.
    #[test]
    fn refuses_a_tensor_that_is_not_filled() {
        let dir = tempfile::tempdir().unwrap();
        let specs = [spec("a", StoredDType::F32, &[2])];
        assert!(write(dir.path(), &specs, 100, &mut |_, out| out.write_all(&[0; 4])).is_err());
    }
}
