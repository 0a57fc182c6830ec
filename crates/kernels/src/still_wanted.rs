//! Whether anybody still waits for a pass. Asked in the middle of long work, which is left undone once nobody does: what it
//! would have made is never looked at.

use std::fmt;

use thiserror::Error;

/// Says whether a pass is still wanted; the default always says so.
#[derive(Clone, Copy, Default)]
pub struct StillWanted<'a>(Option<&'a (dyn Fn() -> bool + Sync)>);

/// A pass was given up: nobody waits for it any more.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
#[error("nobody waits for the pass any more")]
pub struct GivenUp;

impl<'a> StillWanted<'a> {
    /// As long as `is_wanted` says so, which takes a moment to ask.
    pub fn while_true(is_wanted: &'a (dyn Fn() -> bool + Sync)) -> Self {
        Self(Some(is_wanted))
    }

    /// An error once it is not.
    pub fn check(&self) -> Result<(), GivenUp> {
        if self.0.is_none_or(|is_wanted| is_wanted()) { Ok(()) } else { Err(GivenUp) }
    }
}

impl fmt::Debug for StillWanted<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.0.is_some() { "while somebody waits" } else { "always" })
    }
}
