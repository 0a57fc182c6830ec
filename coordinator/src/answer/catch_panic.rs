//! Work for a request that must not take the thread down with it: a panic is logged and becomes the request's error.

use std::panic::{AssertUnwindSafe, catch_unwind};

use crate::answer::request_error::RequestError;

/// Runs `work`; a panic in it is logged here and becomes [`RequestError::Panicked`].
pub(crate) fn catch_panic<T>(work: impl FnOnce() -> Result<T, RequestError>) -> Result<T, RequestError> {
    catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|panic| {
        let message = panic.downcast_ref::<String>().map(String::as_str);
        let message = message.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("no message");
        tracing::error!(message, "a step panicked; its requests are answered with an error");
        Err(RequestError::Panicked)
    })
}
