//! Why a schema has no grammar, as the caller of an answer is told it. The crate that makes grammars tells it to programmers who
//! call the crate: by options of its own, in several lines, or as Rust prints a list.

/// What the crate says of `oneOf`, before it names an option that no request has. Where no text can be of two of its schemas, which
/// it sees by their types, required fields and constants, it takes `oneOf` for `anyOf`.
const ONE_OF: &str = "oneOf constraints are not supported";
/// What it says before a list of keywords.
const KEYWORDS: &str = "Unimplemented keys: ";
/// The line before those that show where a pattern is wrong.
const PATTERN: &str = "regex parse error:";
/// What begins the last of them, which says what is wrong.
const PATTERN_REASON: &str = "error: ";

/// What of `error` says why, on one line.
pub(crate) fn reason(error: &str) -> String {
    // Behind its first line it says where it was, or that it could say more.
    let first = error.lines().next().unwrap_or_default();
    if first.starts_with(ONE_OF) {
        return "oneOf is not followed where its schemas may overlap, but anyOf is".to_owned();
    }
    if let Some(keywords) = first.strip_prefix(KEYWORDS).and_then(listed) {
        return match keywords.as_slice() {
            [keyword] => format!("the keyword {keyword} is not followed"),
            several => format!("the keywords {} are not followed", several.join(", ")),
        };
    }
    if let Some((before, _)) = first.split_once(PATTERN) {
        let reason = error.lines().find_map(|line| line.strip_prefix(PATTERN_REASON));
        return format!("{before}a pattern cannot be followed: {}", reason.unwrap_or("it is no regular expression"));
    }
    first.to_owned()
}

/// The words of a list that Rust has printed, which is JSON as long as they need no escapes.
fn listed(list: &str) -> Option<Vec<String>> {
    serde_json::from_str(list).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_known_is_told_as_it_is() {
        // Would break: a reason that the crate words in another way is lost, or names what it does not say.
        for told in ["no \"$ref\" is followed", "Unimplemented keys: [\"\\u{7}\"]"] {
            assert_eq!(reason(&format!("{told}\n  while processing #")), told);
        }
        assert_eq!(reason(""), "");
    }
}
