//! The key that a server knows a client by, kept out of everything that is shown. Given by flags, sent by `bench` to servers
//! of any kind and by all commands to coordinators.

use std::fmt;

use http::HeaderValue;

use crate::bad_configuration::BadConfiguration;

/// A secret: it goes into a header, and is never shown. Taken as it comes, since whoever parses flags repeats what it refuses.
#[derive(Clone)]
pub(crate) struct ApiKey(pub(crate) String);

impl From<String> for ApiKey {
    fn from(key: String) -> Self {
        Self(key)
    }
}

impl ApiKey {
    /// The header's value.
    pub(crate) fn bearer(&self) -> Result<HeaderValue, BadConfiguration> {
        let is_fine = !self.0.is_empty() && self.0.bytes().all(|byte| byte.is_ascii_graphic());
        let value = is_fine.then(|| HeaderValue::from_str(&format!("Bearer {}", self.0)).ok()).flatten();
        let mut value = value.ok_or_else(|| {
            BadConfiguration::new("the API key is empty, or has blanks or characters that no header takes")
        })?;
        value.set_sensitive(true);
        Ok(value)
    }

    /// What a server said, without the key where it repeats that.
    pub(crate) fn hidden_in(&self, text: &str) -> String {
        text.replace(&self.0, "[the API key]")
    }
}

impl fmt::Debug for ApiKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ApiKey(..)")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_never_shown() {
        // Broken: a key would be read in a report, a log or somebody's terminal.
        let key = ApiKey::from("sk-0123456789".to_owned());
        assert_eq!(key.bearer().unwrap(), "Bearer sk-0123456789");
        assert!(!format!("{key:?} {:?}", key.bearer()).contains("0123"));
        assert_eq!(key.hidden_in("wrong key sk-0123456789!"), "wrong key [the API key]!");
        for wrong in ["", "two words", "umläut", "line\n"] {
            let error = ApiKey::from(wrong.to_owned()).bearer().unwrap_err().to_string();
            assert!(wrong.is_empty() || !error.contains(wrong), "{error}");
        }
    }
}
