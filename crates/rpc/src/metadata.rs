//! The metadata of a call is bounded, and who sends more is told so: HTTP/2 by itself would answer without a gRPC
//! status. Put in place by [`crate::server`].

use http::{HeaderMap, Request};
use tonic::{Status, body::Body};

use crate::{
    around::Within,
    ending::ResponseFuture,
    status::{Fault, Reason},
};

/// The most metadata of one call, counted as HTTP/2 counts it: names, values, and 32 bytes for each entry.
pub const METADATA_BYTES_MAX: usize = 16 << 10;

/// The most that HTTP/2 takes, so that what is a little too long still gets a status. Beyond it the call ends with
/// HTTP's own 431, and beyond four times as much, where a peer seems to do harm, the connection ends.
pub(crate) const HEADER_LIST_BYTES_MAX: u32 = 64 << 10;

/// What HTTP/2 adds for each entry.
const ENTRY_BYTES: usize = 32;

/// Refuses calls with too much metadata.
pub(crate) fn bounded<S: Within>(inner: &mut S, request: Request<Body>) -> ResponseFuture<S::Error> {
    let bytes = size(request.headers());
    if bytes <= METADATA_BYTES_MAX {
        return Box::pin(inner.call(request));
    }
    let found = format!("the metadata has {bytes} bytes, at most {METADATA_BYTES_MAX} are taken");
    let fault = Fault::new(Reason::MetadataTooLarge, found).with("limit", METADATA_BYTES_MAX);
    Box::pin(async { Ok(Status::from(fault).into_http()) })
}

fn size(headers: &HeaderMap) -> usize {
    headers.iter().map(|(name, value)| name.as_str().len() + value.len() + ENTRY_BYTES).sum()
}
