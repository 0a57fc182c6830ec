//! Stop texts: an answer ends where it contains one of them, and what was streamed before must not have given a part of
//! it away.
//!
//! A stop text ends the answer at the token that makes it complete, wherever it began: an answer that must have so many
//! tokens may begin a stop text before the last of these. One that is complete earlier is part of the answer.

/// Watches the text of one sequence for its stop texts.
pub(crate) struct StopTexts {
    stops: Vec<String>,
    /// Text that may be the beginning of a stop text, not yet given out.
    /// Invariant: no stop text that could have ended the answer is in it.
    held: String,
}

/// What may be streamed after some text was added.
#[derive(Debug, PartialEq)]
pub(crate) struct Released {
    /// Text that is certainly part of the answer.
    pub(crate) text: String,
    /// Whether a stop text was reached: the answer ends with `text`.
    pub(crate) stopped: bool,
}

impl StopTexts {
    /// `stops` are not empty texts, which was checked when the request was accepted.
    pub(crate) fn new(stops: Vec<String>) -> Self {
        Self { stops, held: String::new() }
    }

    /// Adds text. A stop text that it completes ends the answer, but only where it `may_stop`: not while the answer is too
    /// short. Where several stop texts match, the one that begins first ends the answer.
    pub(crate) fn push(&mut self, text: String, may_stop: bool) -> Released {
        if self.stops.is_empty() {
            return Released { text, stopped: false };
        }
        let seen = self.held.len();
        self.held.push_str(&text);
        let completed = || self.stops.iter().filter_map(|stop| completed_after(seen, &self.held, stop)).min();
        if let Some(end) = may_stop.then(completed).flatten() {
            self.held.truncate(end);
            return Released { text: std::mem::take(&mut self.held), stopped: true };
        }
        let keep = self.stops.iter().map(|stop| overlap(&self.held, stop)).max().unwrap_or(0);
        let rest = self.held.split_off(self.held.len() - keep);
        Released { text: std::mem::replace(&mut self.held, rest), stopped: false }
    }

    /// The sequence ended another way: what was held back is part of the answer after all.
    pub(crate) fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }
}

/// Where `stop` first begins in `text` among its places that end after the first `seen` bytes.
fn completed_after(seen: usize, text: &str, stop: &str) -> Option<usize> {
    let earliest = text.ceil_char_boundary((seen + 1).saturating_sub(stop.len()));
    text[earliest..].find(stop).map(|at| earliest + at)
}

/// Bytes of the longest suffix of `text` that is a proper prefix of `stop`.
fn overlap(text: &str, stop: &str) -> usize {
    let longest = text.len().min(stop.len().saturating_sub(1));
    (1..=longest).rev().find(|&n| text.as_bytes().ends_with(&stop.as_bytes()[..n])).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The text of an answer of these pieces, which may stop from the piece of that number on (counted from 1).
    fn stream_from(tokens_min: usize, stops: &[&str], pieces: &[&str]) -> (String, bool) {
        let mut watch = StopTexts::new(stops.iter().map(|s| s.to_string()).collect());
        let mut all = String::new();
        for (piece, number) in pieces.iter().zip(1..) {
            let released = watch.push(piece.to_string(), number >= tokens_min);
            all += &released.text;
            if released.stopped {
                return (all, true);
            }
        }
        (all + &watch.finish(), false)
    }

    fn stream(stops: &[&str], pieces: &[&str]) -> (String, bool) {
        stream_from(0, stops, pieces)
    }

    #[test]
    fn stop_across_tokens_is_not_given_away() {
        // Would break: the beginning of a stop text is streamed before its end is known.
        assert_eq!(stream(&["</end>"], &["good", " <", "/e", "nd>", " more"]), ("good ".into(), true));
        assert_eq!(stream(&["ab"], &["xa", "ab"]), ("xa".into(), true));
    }

    #[test]
    fn first_stop_wins() {
        // Would break: with two stop texts in one token the answer runs on to the later one.
        assert_eq!(stream(&["later", "now"], &["a now b later"]), ("a ".into(), true));
    }

    #[test]
    fn a_stop_text_counts_where_it_is_complete() {
        // Would break: an answer ends before it has its least length, or runs past a stop text that is complete by then.
        let pieces = ["x", "a", "b", "y", "a", "b", "z"];
        for (tokens_min, expected) in [(3, "x"), (4, "xaby"), (6, "xaby"), (7, "xabyabz")] {
            let stops = tokens_min < 7;
            assert_eq!(stream_from(tokens_min, &["ab"], &pieces), (expected.into(), stops), "{tokens_min}");
        }
        assert_eq!(stream_from(2, &["aa"], &["aa", "a"]), ("a".into(), true), "it overlaps one that came too early");
        // "b" was complete in the first piece already, where only the beginning of "abc" is held back.
        assert_eq!(stream_from(2, &["abc", "b"], &["ab", "x"]), ("abx".into(), false));
        assert_eq!(stream_from(2, &["abc", "b"], &["ab", "xb"]), ("abx".into(), true));
        assert_eq!(stream_from(2, &["é!", "!"], &["é", "!"]), (String::new(), true), "characters stay whole");
    }

    #[test]
    fn held_text_comes_out_at_the_end() {
        // Would break: an answer that ends like the beginning of a stop text loses its last characters.
        assert_eq!(stream(&["é!"], &["caf", "é"]), ("café".into(), false));
        assert_eq!(stream_from(9, &["é!"], &["caf", "é"]), ("café".into(), false));
    }
}
