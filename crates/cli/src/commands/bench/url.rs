//! The address of a server that speaks OpenAI's protocol. Parsed by `bench`, used by
//! [`super::http_client`].

use std::{fmt, str::FromStr};

use http::Uri;

/// `http://HOST[:PORT]/PATH`, the path without a slash at its end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct BaseUrl(String);

const EXPECTED: &str = "expected http://HOST:PORT/v1 or https://HOST/v1";

impl FromStr for BaseUrl {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let refused = |why: &str| format!("{why}, {EXPECTED}");
        // Before anything repeats the text: it may hold a password.
        if text.contains('@') {
            return Err(refused("a URL here has no user and no password (a key is given as SIDA_API_KEY)"));
        }
        let uri: Uri = text.parse().map_err(|error| refused(&format!("{text:?} is no URL ({error})")))?;
        let (Some("http" | "https"), Some(authority)) = (uri.scheme_str(), uri.authority()) else {
            return Err(refused(&format!("{text:?} does not begin with http:// or https:// and a host")));
        };
        let host = authority.host();
        if host.is_empty() || (authority.port_u16().is_none() && !authority.as_str().ends_with(host)) {
            return Err(refused(&format!("{text:?} has no host and port that can be connected to")));
        }
        if text.contains(['?', '#']) {
            return Err(refused(&format!("{text:?} has more than a path")));
        }
        let base = text.trim_end_matches('/');
        // What is written without a path is OpenAI's own.
        let path = if uri.path() == "/" { "/v1" } else { "" };
        Ok(Self(format!("{base}{path}")))
    }
}

impl BaseUrl {
    pub(crate) fn is_https(&self) -> bool {
        self.0.starts_with("https://")
    }

    /// The address of an endpoint, as `/completions`.
    pub(crate) fn endpoint(&self, path: &str) -> Uri {
        format!("{}{path}", self.0).parse().expect("a path that is ours belongs to any URL")
    }
}

impl fmt::Display for BaseUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls_parse() {
        // Broken: requests would go to another path than the one that was given.
        for (text, completions) in [
            ("http://127.0.0.1:8000/v1", "http://127.0.0.1:8000/v1/completions"),
            ("http://127.0.0.1:8000/v1/", "http://127.0.0.1:8000/v1/completions"),
            ("http://localhost:8000", "http://localhost:8000/v1/completions"),
            ("https://models.example/", "https://models.example/v1/completions"),
            ("https://models.example/openai/v2", "https://models.example/openai/v2/completions"),
            ("http://[::1]:8000/v1", "http://[::1]:8000/v1/completions"),
        ] {
            let found = text.parse::<BaseUrl>().map(|base| base.endpoint("/completions").to_string());
            assert_eq!(found.as_deref(), Ok(completions), "{text}");
        }
    }

    #[test]
    fn what_is_no_url_is_refused() {
        // Broken: a mistyped port would be port 80, a query be lost, or a password be shown in the report.
        for wrong in [
            "",
            "localhost:8000",
            "localhost",
            "/v1",
            "ftp://localhost/v1",
            "http://",
            "http://:8000/v1",
            "http://localhost:99999/v1",
            "http://localhost:x/v1",
            "http://localhost:/v1",
            "http://localhost/v1?version=1",
            "http://localhost/v1#top",
            "http://local host/v1",
        ] {
            assert!(wrong.parse::<BaseUrl>().unwrap_err().contains("expected http://"), "{wrong}");
        }
        let error = "http://me:secret@localhost/v1".parse::<BaseUrl>().unwrap_err();
        assert!(error.contains("no password") && !error.contains("secret"), "{error}");
    }
}
