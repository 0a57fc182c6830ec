//! Tensors of the Open Inference Protocol: the elements of inputs, checked against their type and shape, whether they came in a
//! list or as raw bytes; and outputs, as raw bytes.

use bytes::{Buf, BufMut, Bytes, BytesMut};
use serde_json::Value;
use sida_proto::inference::{
    InferTensorContents, model_infer_request::InferInputTensor, model_infer_response::InferOutputTensor,
};
use sida_telemetry::counted;

use crate::doors::openai::error::ApiError;

/// Bytes in front of each raw element of BYTES: its length, little-endian.
const LENGTH_BYTES: usize = 4;

/// The elements of an input.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Elements {
    /// Of a tensor of BYTES.
    Texts(Vec<String>),
    /// Of a tensor of BOOL.
    Flags(Vec<bool>),
}

/// The elements of `input`, taken from `raw` where the request carries its contents so.
pub(crate) fn elements(input: &InferInputTensor, raw: Option<&Bytes>) -> Result<Elements, ApiError> {
    let contents = input.contents.clone().unwrap_or_default();
    let found = match (input.datatype.as_str(), raw) {
        ("BYTES", None) => Elements::Texts(texts(input, contents.bytes_contents.clone())?),
        ("BYTES", Some(raw)) => Elements::Texts(texts(input, split(input, raw.clone())?)?),
        ("BOOL", None) => Elements::Flags(contents.bool_contents.clone()),
        ("BOOL", Some(raw)) => Elements::Flags(raw.iter().map(|&byte| byte != 0).collect()),
        (other, _) => return Err(wrong(input, format!("datatype {other:?}"), "BYTES, or BOOL for a flag")),
    };
    let count = match &found {
        Elements::Texts(texts) => texts.len(),
        Elements::Flags(flags) => flags.len(),
    };
    let is_mixed = raw.is_some() && contents != InferTensorContents::default();
    match volume(&input.shape) {
        _ if is_mixed => Err(wrong(input, "both contents and raw contents", "one of them")),
        Some(volume) if volume == count as u64 => Ok(found),
        Some(_) => Err(wrong(input, counted(count, "element"), format!("as many as its shape {:?}", input.shape))),
        None => Err(wrong(input, format!("shape {:?}", input.shape), "extents of 0 and more")),
    }
}

/// How many elements a shape has; `None` where an extent is negative or their product is beyond counting.
fn volume(shape: &[i64]) -> Option<u64> {
    shape.iter().try_fold(1u64, |volume, &extent| volume.checked_mul(u64::try_from(extent).ok()?))
}

fn texts(input: &InferInputTensor, elements: Vec<Bytes>) -> Result<Vec<String>, ApiError> {
    let text = |bytes: Bytes| {
        String::from_utf8(bytes.into())
            .map_err(|error| wrong(input, format!("a text that is not UTF-8 ({})", error.utf8_error()), "UTF-8"))
    };
    elements.into_iter().map(text).collect()
}

/// The elements of raw BYTES.
fn split(input: &InferInputTensor, mut raw: Bytes) -> Result<Vec<Bytes>, ApiError> {
    let mut elements = Vec::new();
    while !raw.is_empty() {
        let cut = |what: &str| wrong(input, format!("raw contents that end within {what}"), "whole elements");
        if raw.len() < LENGTH_BYTES {
            return Err(cut("a length"));
        }
        let length = raw.get_u32_le() as usize;
        if raw.len() < length {
            return Err(cut("an element"));
        }
        elements.push(raw.split_to(length));
    }
    Ok(elements)
}

/// The contents of an input as raw bytes, in whose place they come.
pub(crate) fn raw(input: &mut InferInputTensor) -> Bytes {
    let InferTensorContents { bytes_contents, bool_contents, .. } = input.contents.take().unwrap_or_default();
    match input.datatype.as_str() {
        "BOOL" => bool_contents.into_iter().map(u8::from).collect(),
        _ => raw_texts(bytes_contents.iter().map(|bytes| &bytes[..])).1,
    }
}

/// How many elements of BYTES there are, and all of them as raw bytes.
fn raw_texts<'a>(texts: impl Iterator<Item = &'a [u8]>) -> (i64, Bytes) {
    let (mut raw, mut count) = (BytesMut::new(), 0);
    for text in texts {
        // A message is smaller than 4 GiB.
        raw.put_u32_le(text.len() as u32);
        raw.put_slice(text);
        count += 1;
    }
    (count, raw.freeze())
}

/// An error of an input.
pub(crate) fn wrong(
    input: &InferInputTensor,
    found: impl std::fmt::Display,
    expected: impl std::fmt::Display,
) -> ApiError {
    ApiError::field_because("inputs", format!("input {:?} has {found}, expected {expected}", input.name))
}

/// An output of BYTES with one element per text, and its raw bytes.
pub(crate) fn text_output<'a>(name: &str, texts: impl IntoIterator<Item = &'a str>) -> (InferOutputTensor, Bytes) {
    let (count, raw) = raw_texts(texts.into_iter().map(str::as_bytes));
    (output(name, "BYTES", vec![count]), raw)
}

/// The elements of an output, as JSON has them.
pub(crate) fn values(output: &InferOutputTensor, raw: &Bytes) -> Vec<Value> {
    if output.datatype == "FP32" {
        let float = |bytes: &[u8; 4]| Value::from(f32::from_le_bytes(*bytes));
        return raw.as_chunks().0.iter().map(float).collect();
    }
    let (mut raw, mut texts) = (raw.clone(), Vec::new());
    // Written by `text_output`: every length is followed by as many bytes.
    while !raw.is_empty() {
        let length = raw.get_u32_le() as usize;
        texts.push(String::from_utf8_lossy(&raw.split_to(length)).into_owned().into());
    }
    texts
}

/// What is said of an output.
pub(crate) fn output(name: &str, datatype: &str, shape: Vec<i64>) -> InferOutputTensor {
    InferOutputTensor { name: name.to_owned(), datatype: datatype.to_owned(), shape, ..Default::default() }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn input(datatype: &str, shape: &[i64], contents: Option<InferTensorContents>) -> InferInputTensor {
        InferInputTensor {
            name: "text_input".to_owned(),
            datatype: datatype.to_owned(),
            shape: shape.to_vec(),
            contents,
            ..Default::default()
        }
    }

    fn bytes(texts: &[&'static str]) -> InferTensorContents {
        let bytes_contents = texts.iter().map(|text| Bytes::from_static(text.as_bytes())).collect();
        InferTensorContents { bytes_contents, ..Default::default() }
    }

    #[test]
    fn what_does_not_fit_is_named() {
        // Would break: a tensor is read as something else, or its caller is not told what was wrong with it.
        let no_utf8 = InferTensorContents { bytes_contents: vec![Bytes::from_static(&[0xff])], ..Default::default() };
        let one = || Some(bytes(&["one"]));
        let cases = [
            (input("BYTES", &[2], one()), None, "1 element,"),
            (input("BYTES", &[-1], one()), None, "shape [-1]"),
            (input("BYTES", &[i64::MAX, i64::MAX], one()), None, "shape"),
            (input("FP32", &[1], None), None, "FP32"),
            (input("BYTES", &[1], Some(no_utf8)), None, "invalid utf-8"),
            (input("BYTES", &[1], None), Some(&[9, 0, 0, 0, b'a'][..]), "end within an element"),
            (input("BYTES", &[1], None), Some(&[1, 0][..]), "end within a length"),
            (input("BYTES", &[1], one()), Some(&[1, 0, 0, 0, b'a'][..]), "both contents"),
            (input("BOOL", &[], None), Some(&[][..]), "0 elements"),
        ];
        for (input, raw, expected) in cases {
            let raw = raw.map(Bytes::copy_from_slice);
            let error = elements(&input, raw.as_ref()).expect_err(expected).json()["error"]["message"].to_string();
            assert!(error.contains("has ") && error.contains(expected), "{error}");
        }
    }

    proptest! {
        #[test]
        fn texts_come_back(texts in prop::collection::vec(".*", 0..5)) {
            // Would break: a text changes on its way in or out.
            let (output, raw) = text_output("text_output", texts.iter().map(String::as_str));
            let input = input(&output.datatype, &output.shape, None);
            prop_assert_eq!(elements(&input, Some(&raw)).expect("whole"), Elements::Texts(texts));
        }

        #[test]
        fn no_bytes_panic(raw in prop::collection::vec(any::<u8>(), 0..64), shape in prop::collection::vec(any::<i64>(), 0..3)) {
            // Would break: a caller ends the server by what it sends.
            for datatype in ["BYTES", "BOOL"] {
                drop(elements(&input(datatype, &shape, None), Some(&Bytes::copy_from_slice(&raw))));
            }
        }
    }
}
