//! Which calls are streams from the client, as the descriptors of services say it. Asked by [`crate::server`].

use std::collections::HashSet;

use prost::{DecodeError, Message};
use prost_types::FileDescriptorSet;

/// The paths of all methods of encoded `FileDescriptorSet`s, and of reflection, that take more than one message.
pub(crate) fn client_streams(descriptors: &[&[u8]]) -> Result<HashSet<String>, DecodeError> {
    let reflection =
        [tonic_reflection::pb::v1::FILE_DESCRIPTOR_SET, tonic_reflection::pb::v1alpha::FILE_DESCRIPTOR_SET];
    let mut paths = HashSet::new();
    for encoded in reflection.iter().chain(descriptors) {
        for file in FileDescriptorSet::decode(*encoded)?.file {
            for service in &file.service {
                let streams = service.method.iter().filter(|method| method.client_streaming());
                paths.extend(streams.map(|method| format!("/{}.{}/{}", file.package(), service.name(), method.name())));
            }
        }
    }
    Ok(paths)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn streams_are_told_from_single_requests() {
        // Would break: a stream that is silent for a minute is ended as a request that is late.
        let found = client_streams(&[tonic_health::pb::FILE_DESCRIPTOR_SET]).unwrap();
        let expected = ["v1", "v1alpha"]
            .map(|version| format!("/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo"));
        assert_eq!(found, HashSet::from(expected));
        assert!(client_streams(&[b"\xff"]).is_err());
    }
}
