//! Web pages that may ask from a browser, by where they come from: `https://chat.example.org`, or `*` for all.

use std::str::FromStr;

use axum::http::{HeaderValue, Uri};
use thiserror::Error;

/// An origin as browsers send it, or all of them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CorsOrigin {
    /// Pages of every origin.
    Any,
    /// Pages of this one: a scheme, a host, and a port unless it is the scheme's own.
    Of(HeaderValue),
}

/// Why a text is no origin.
#[derive(Debug, Error, PartialEq, Eq)]
#[error("{0:?} is no origin, expected as https://chat.example.org or http://localhost:3000, without a path, or *")]
pub struct CorsOriginError(String);

impl FromStr for CorsOrigin {
    type Err = CorsOriginError;

    fn from_str(text: &str) -> Result<Self, CorsOriginError> {
        if text == "*" {
            return Ok(Self::Any);
        }
        let refused = || CorsOriginError(text.to_owned());
        let uri = Uri::from_str(text).map_err(|_| refused())?;
        // Browsers write an origin in one way only, and compare it letter by letter.
        let written = match (uri.scheme_str(), uri.authority()) {
            (Some(scheme @ ("http" | "https")), Some(authority)) => format!("{scheme}://{authority}").to_lowercase(),
            _ => return Err(refused()),
        };
        match HeaderValue::from_str(text) {
            Ok(value) if written == text && !text.contains('@') => Ok(Self::Of(value)),
            _ => Err(refused()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn origins_are_as_browsers_write_them() {
        // Would break: an origin is taken that no browser ever sends, and its pages are refused without a word.
        assert_eq!("*".parse(), Ok(CorsOrigin::Any));
        for origin in ["https://chat.example.org", "http://localhost:3000", "http://[::1]:8080"] {
            assert_eq!(origin.parse(), Ok(CorsOrigin::Of(HeaderValue::from_str(origin).unwrap())), "{origin}");
        }
        for wrong in [
            "",
            "chat.example.org",
            "https://chat.example.org/",
            "https://chat.example.org/a",
            "https://Chat.example.org",
            "ftp://chat.example.org",
            "https://a@example.org",
            "https://*.example.org/x",
            "null",
            "https://a b",
        ] {
            assert_eq!(wrong.parse::<CorsOrigin>(), Err(CorsOriginError(wrong.to_owned())), "{wrong}");
        }
    }
}
