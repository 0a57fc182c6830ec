//! The header of a GGUF file: what it says of the model, and where tensors lie. Everything is checked here; no length that a
//! file claims is believed, and what is kept is bounded.

use std::collections::BTreeMap;

use super::bytes::{Bytes, NumberType};

/// What a GGUF file begins with.
pub(super) const MAGIC: &[u8; 4] = b"GGUF";
/// The layouts that are read: those of today, and before files could be of big-endian machines.
const VERSIONS: [u32; 2] = [2, 3];
/// Where data begins and tensors do, if a file does not say.
const ALIGNMENT: u64 = 32;
const ALIGNMENT_KEY: &str = "general.alignment";
/// The longest header that is looked at. Those of today have up to 20 MB, nearly all of it tokens.
pub(super) const HEADER_BYTES_MAX: usize = 256 << 20;
/// More keys, tensors and dimensions than any file has; and elements of all lists of one.
const KEYS_MAX: u64 = 1 << 16;
const TENSORS_MAX: u64 = 1 << 20;
const DIMENSIONS_MAX: u32 = 4;
const ELEMENTS_MAX: u64 = 16 << 20;

/// The numbers of GGUF's other types.
const FLAG: u32 = 7;
const TEXT: u32 = 8;
const LIST: u32 = 9;

/// What a file says under a key.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Value {
    Integer(i64),
    Float(f64),
    Flag(bool),
    Text(String),
    Texts(Vec<String>),
    Integers(Vec<i64>),
    Floats(Vec<f32>),
}

/// A tensor as the header tells of it.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct TensorInfo {
    pub(super) name: String,
    /// Outermost first, which is the other way round in the file.
    pub(super) shape: Vec<usize>,
    /// GGML's number of the format of its values.
    pub(super) format: u32,
    /// From where data begins.
    pub(super) at: u64,
}

/// All of it.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Header {
    pub(super) values: BTreeMap<String, Value>,
    pub(super) tensors: Vec<TensorInfo>,
    /// Where data begins in the file.
    pub(super) data_at: u64,
    /// What tensors begin at a multiple of.
    pub(super) alignment: u64,
}

impl Header {
    /// Reads the header of a file that begins with these bytes; or what is wrong with it.
    pub(super) fn parse(file: &[u8]) -> Result<Self, String> {
        let mut bytes = Bytes::new(&file[..file.len().min(HEADER_BYTES_MAX)]);
        if bytes.take(MAGIC.len() as u64)? != MAGIC {
            return Err("is no GGUF file".to_owned());
        }
        let version = bytes.u32()?;
        if VERSIONS.contains(&version.swap_bytes()) {
            return Err("is a GGUF file of a big-endian machine, expected little-endian".to_owned());
        }
        if !VERSIONS.contains(&version) {
            return Err(format!("is GGUF version {version}, expected 2 or 3"));
        }
        let (tensors, keys) = (bytes.u64()?, bytes.u64()?);
        if tensors > TENSORS_MAX || keys > KEYS_MAX {
            return Err(format!(
                "claims {tensors} tensors and {keys} keys, more than the {TENSORS_MAX} and {KEYS_MAX} allowed"
            ));
        }
        let (mut values, mut elements) = (BTreeMap::new(), 0);
        for _ in 0..keys {
            let key = bytes.text()?;
            let value = value(&mut bytes, &mut elements).map_err(|error| format!("{error} (key {key})"))?;
            if values.insert(key.clone(), value).is_some() {
                return Err(format!("has key {key} twice"));
            }
        }
        let tensors = (0..tensors).map(|_| tensor(&mut bytes)).collect::<Result<Vec<_>, _>>()?;
        let alignment = match values.get(ALIGNMENT_KEY) {
            None => ALIGNMENT,
            Some(&Value::Integer(alignment @ 1..=65_536)) => alignment as u64,
            Some(Value::Integer(other)) => return Err(format!("{ALIGNMENT_KEY} is {other}, expected 1 to 65536")),
            Some(_) => return Err(format!("{ALIGNMENT_KEY} is no whole number, expected 1 to 65536")),
        };
        if let Some(tensor) = tensors.iter().find(|tensor| !tensor.at.is_multiple_of(alignment)) {
            return Err(format!(
                "tensor {} begins at byte {}, expected a multiple of {alignment}",
                tensor.name, tensor.at
            ));
        }
        let data_at = (bytes.at() as u64).next_multiple_of(alignment);
        Ok(Self { values, tensors, data_at, alignment })
    }
}

fn value(bytes: &mut Bytes<'_>, elements: &mut u64) -> Result<Value, String> {
    let kind = bytes.u32()?;
    match (kind, NumberType::of(kind)) {
        (_, Some(NumberType::Integer(of))) => bytes.integer(of).map(Value::Integer),
        (_, Some(NumberType::Float(of))) => bytes.float(of).map(Value::Float),
        (FLAG, _) => flag(bytes).map(Value::Flag),
        (TEXT, _) => bytes.text().map(Value::Text),
        (LIST, _) => list(bytes, elements),
        (other, _) => Err(format!("holds a value of type {other}, which GGUF does not have")),
    }
}

fn flag(bytes: &mut Bytes<'_>) -> Result<bool, String> {
    match bytes.take(1)? {
        [0] => Ok(false),
        [1] => Ok(true),
        other => Err(format!("holds {other:?} for true or false")),
    }
}

/// A list grows as its elements are read, each of which takes a byte of the file at least.
fn list(bytes: &mut Bytes<'_>, elements: &mut u64) -> Result<Value, String> {
    let (kind, count) = (bytes.u32()?, bytes.u64()?);
    *elements = elements.saturating_add(count);
    if *elements > ELEMENTS_MAX {
        return Err(format!("holds a list of {count} elements, more than the {ELEMENTS_MAX} allowed for all"));
    }
    Ok(match (kind, NumberType::of(kind)) {
        (TEXT, _) => Value::Texts((0..count).map(|_| bytes.text()).collect::<Result<_, _>>()?),
        (FLAG, _) => Value::Integers((0..count).map(|_| flag(bytes).map(i64::from)).collect::<Result<_, _>>()?),
        (_, Some(NumberType::Integer(of))) => {
            Value::Integers((0..count).map(|_| bytes.integer(of)).collect::<Result<_, _>>()?)
        }
        (_, Some(NumberType::Float(of))) => {
            Value::Floats((0..count).map(|_| bytes.float(of).map(|number| number as f32)).collect::<Result<_, _>>()?)
        }
        (other, None) => return Err(format!("holds a list of type {other}, expected numbers, flags or texts")),
    })
}

fn tensor(bytes: &mut Bytes<'_>) -> Result<TensorInfo, String> {
    let name = bytes.text()?;
    let dimensions = bytes.u32()?;
    if dimensions == 0 || dimensions > DIMENSIONS_MAX {
        return Err(format!("tensor {name} has {dimensions} dimensions, expected 1 to {DIMENSIONS_MAX}"));
    }
    let mut shape = Vec::new();
    for _ in 0..dimensions {
        let size = bytes.u64()?;
        match usize::try_from(size) {
            Ok(size) if size > 0 => shape.insert(0, size),
            _ => return Err(format!("tensor {name} has a dimension of {size}")),
        }
    }
    Ok(TensorInfo { name, shape, format: bytes.u32()?, at: bytes.u64()? })
}

#[cfg(test)]
mod tests {
    use std::io::Cursor;

    use candle_core::{
        Device, Tensor,
        quantized::{GgmlDType, QTensor, gguf_file},
    };

    use super::*;

    /// A file as another implementation writes it.
    fn written() -> Vec<u8> {
        use gguf_file::Value;
        let tensor = |shape: &[usize], dtype| {
            QTensor::quantize(&Tensor::ones(shape, candle_core::DType::F32, &Device::Cpu).unwrap(), dtype).unwrap()
        };
        let (wide, blocks) = (tensor(&[3, 5], GgmlDType::F32), tensor(&[2, 4, 256], GgmlDType::Q6K));
        let texts = Value::Array(["a", "", "Ġb"].map(|text| Value::String(text.to_owned())).to_vec());
        let values = [
            ("general.architecture", Value::String("qwen3moe".to_owned())),
            ("some.size", Value::U32(7)),
            ("some.large", Value::U64(1 << 40)),
            ("some.negative", Value::I8(-3)),
            ("some.number", Value::F32(1e-6)),
            ("some.flag", Value::Bool(true)),
            ("some.texts", texts),
            ("some.scores", Value::Array(vec![Value::F32(0.5), Value::F32(-1.5)])),
            ("some.types", Value::Array(vec![Value::I32(1), Value::I32(3)])),
        ];
        let mut file = Cursor::new(Vec::new());
        let values: Vec<_> = values.iter().map(|(key, value)| (*key, value)).collect();
        gguf_file::write(&mut file, &values, &[("wide.weight", &wide), ("blocks.weight", &blocks)]).unwrap();
        file.into_inner()
    }

    #[test]
    fn what_another_implementation_writes_is_read() {
        // Would break: people's files would be refused, or tensors looked for where others lie.
        let file = written();
        let header = Header::parse(&file).unwrap();
        let expected: [(&str, Value); 9] = [
            ("general.architecture", Value::Text("qwen3moe".to_owned())),
            ("some.size", Value::Integer(7)),
            ("some.large", Value::Integer(1 << 40)),
            ("some.negative", Value::Integer(-3)),
            ("some.number", Value::Float(1e-6)),
            ("some.flag", Value::Flag(true)),
            ("some.texts", Value::Texts(["a", "", "Ġb"].map(str::to_owned).to_vec())),
            ("some.scores", Value::Floats(vec![0.5, -1.5])),
            ("some.types", Value::Integers(vec![1, 3])),
        ];
        assert_eq!(header.values, expected.map(|(key, value)| (key.to_owned(), value)).into());
        let told: Vec<_> = header.tensors.iter().map(|t| (&*t.name, &*t.shape, t.format, t.at)).collect();
        assert_eq!(told, [("wide.weight", &[3, 5][..], 0, 0), ("blocks.weight", &[2, 4, 256], 14, 64)]);
        let at = header.data_at as usize;
        assert_eq!(file[at..at + 60], 1_f32.to_le_bytes().repeat(15));
    }

    #[test]
    fn a_header_that_is_cut_anywhere_is_refused() {
        // Would break: half a download would be read as a model, or end the process.
        let file = written();
        let whole = Header::parse(&file).unwrap();
        for length in 0..whole.data_at as usize {
            if let Ok(header) = Header::parse(&file[..length]) {
                assert_eq!(header, whole, "only what fills up to the data may be missing");
                assert!(whole.data_at as usize - length < 32);
            }
        }
    }

    #[test]
    fn a_header_with_any_byte_changed_is_read_or_refused() {
        // Would break: a hostile file would take all memory by a length that it claims, or panic.
        let file = written();
        let end = Header::parse(&file).unwrap().data_at as usize;
        for at in 0..end {
            for to in [0, 1, 7, 0x7f, 0x80, 0xff] {
                let mut changed = file[..end].to_vec();
                changed[at] = to;
                let _ = Header::parse(&changed);
            }
        }
    }

    #[test]
    fn what_is_claimed_is_bounded() {
        // Would break: a small file that claims a large list or many tensors would take the memory for them first.
        let begin =
            |tensors: u64, keys: u64| [&b"GGUF\x03\0\0\0"[..], &tensors.to_le_bytes(), &keys.to_le_bytes()].concat();
        let text = |text: &str| [&(text.len() as u64).to_le_bytes()[..], text.as_bytes()].concat();
        let list =
            |kind: u32, count: u64| [&9_u32.to_le_bytes()[..], &kind.to_le_bytes(), &count.to_le_bytes()].concat();
        let cases = [
            (begin(1 << 40, 0), "claims 1099511627776 tensors"),
            (begin(0, u64::MAX), "keys, more than"),
            (begin(1, 0), "ends in its header"),
            ([begin(0, 1), u64::MAX.to_le_bytes().to_vec()].concat(), "ends in its header"),
            ([begin(0, 1), text("k"), list(8, 1 << 60)].concat(), "more than the 16777216 allowed"),
            ([begin(0, 1), text("k"), list(8, 1 << 20)].concat(), "ends in its header"),
            ([begin(0, 1), text("k"), list(9, 1)].concat(), "list of type 9"),
            ([begin(0, 1), text("k"), 77_u32.to_le_bytes().to_vec()].concat(), "type 77"),
            ([begin(1, 0), text("t"), 5_u32.to_le_bytes().to_vec()].concat(), "5 dimensions"),
            ([begin(1, 0), text("t"), 1_u32.to_le_bytes().to_vec(), vec![0; 20]].concat(), "dimension of 0"),
            (b"GGUF\0\0\0\x03".to_vec(), "big-endian"),
            (b"GGUF\x01\0\0\0".to_vec(), "version 1"),
        ];
        for (file, expected) in cases {
            let error = Header::parse(&file).unwrap_err();
            assert!(error.contains(expected), "{error} does not say {expected}");
        }
    }
}
