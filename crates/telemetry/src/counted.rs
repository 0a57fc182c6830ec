//! How many of a thing there are, as a message tells it.

use std::fmt::Display;

/// `count` of what `noun` names one of: `1 text`, `2 texts`.
pub fn counted<N: Display + PartialEq + From<u8>>(count: N, noun: &str) -> String {
    let plural = if count == N::from(1) { "" } else { "s" };
    format!("{count} {noun}{plural}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_is_no_plural() {
        // Would break: a message speaks of 1 texts.
        assert_eq!([0, 1, 2].map(|count: usize| counted(count, "text")), ["0 texts", "1 text", "2 texts"]);
    }
}
