//! Float payloads: rows of activations as little-endian float32, the only dtype that travels today. The
//! largest things on the wire, so they are copied at most once on either side. Used by [`super::call`] and by
//! the nodes that scatter results straight from a payload.

use bytes::Bytes;

/// Bytes of one value.
pub const VALUE_BYTES: usize = size_of::<f32>();

/// The values of `payload`. A payload whose length is no multiple of 4 loses its last bytes: check it first.
pub fn from_payload(payload: &[u8]) -> Vec<f32> {
    payload.chunks_exact(VALUE_BYTES).map(value).collect()
}

/// The values of `payload` into `out`, without an allocation. Panics unless `payload` holds exactly as many.
pub fn copy_from_payload(payload: &[u8], out: &mut [f32]) {
    assert_eq!(payload.len(), out.len() * VALUE_BYTES, "payload of another number of values");
    for (out, bytes) in out.iter_mut().zip(payload.chunks_exact(VALUE_BYTES)) {
        *out = value(bytes);
    }
}

/// `values` as a payload. On a little-endian machine the vector itself becomes the payload; nothing is copied.
pub fn into_payload(values: Vec<f32>) -> Bytes {
    if cfg!(target_endian = "little") { Bytes::from_owner(Owned(values)) } else { to_payload(&values) }
}

/// A payload that holds a copy of `values`.
pub fn to_payload(values: &[f32]) -> Bytes {
    if cfg!(target_endian = "little") {
        return Bytes::copy_from_slice(bytemuck::cast_slice(values));
    }
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}

/// Values whose memory serves as the bytes of a payload.
struct Owned(Vec<f32>);

impl AsRef<[u8]> for Owned {
    fn as_ref(&self) -> &[u8] {
        bytemuck::cast_slice(&self.0)
    }
}

fn value(bytes: &[u8]) -> f32 {
    f32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]])
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn payloads_are_lossless(values in prop::collection::vec(any::<u32>().prop_map(f32::from_bits), 0..100)) {
            // Broken: an expert would compute on other numbers than the coordinator sent (NaN bits included).
            let bits = |values: &[f32]| values.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
            let by_copy = to_payload(&values);
            prop_assert_eq!(&by_copy, &into_payload(values.clone()));
            prop_assert_eq!(bits(&from_payload(&by_copy)), bits(&values));
            let mut out = vec![0.0; values.len()];
            copy_from_payload(&by_copy, &mut out);
            prop_assert_eq!(bits(&out), bits(&values));
        }
    }
}
