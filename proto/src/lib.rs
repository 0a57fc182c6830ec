//! The wire: `sida.v1` as generated from `sida/v1/*.proto`, and the checks between it and our own types; and [`inference`], the
//! Open Inference Protocol, which clients of other servers speak.
//! Nothing that came from outside is used before it went through [`wire`].

pub mod wire;

/// Generated from `sida/v1/*.proto`.
#[allow(missing_docs, unreachable_pub, clippy::all)]
pub mod v1 {
    tonic::include_proto!("sida.v1");
}

/// Generated from `inference/open_inference.proto`.
#[allow(missing_docs, unreachable_pub, clippy::all)]
pub mod inference {
    tonic::include_proto!("inference");
}

/// The encoded `FileDescriptorSet`, for gRPC reflection.
pub const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptors.bin"));
