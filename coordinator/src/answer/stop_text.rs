//! Stop texts: an answer ends where it contains one of them, and what was streamed before must not have given a part of
//! it away.

/// Watches the text of one sequence for its stop texts.
pub(crate) struct StopTexts {
    stops: Vec<String>,
    /// Text that may be the beginning of a stop text, not yet given out.
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

    /// Adds text. Where several stop texts match, the one that begins first ends the answer.
    pub(crate) fn push(&mut self, text: String) -> Released {
        if self.stops.is_empty() {
            return Released { text, stopped: false };
        }
        self.held.push_str(&text);
        if let Some(end) = self.stops.iter().filter_map(|stop| self.held.find(stop.as_str())).min() {
            self.held.truncate(end);
            return Released { text: std::mem::take(&mut self.held), stopped: true };
        }
        let keep = self.stops.iter().map(|stop| overlap(&self.held, stop)).max().unwrap_or(0);
        let rest = self.held.split_off(self.held.len() - keep);
        Released { text: std::mem::replace(&mut self.held, rest), stopped: false }
    }

    /// Adds text in which no stop text is looked for, not even the beginning of one: all of it is part of the answer.
    pub(crate) fn pass(&mut self, text: String) -> Released {
        Released { text: self.finish() + &text, stopped: false }
    }

    /// The sequence ended another way: what was held back is part of the answer after all.
    pub(crate) fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }
}

/// Bytes of the longest suffix of `text` that is a proper prefix of `stop`.
fn overlap(text: &str, stop: &str) -> usize {
    let longest = text.len().min(stop.len().saturating_sub(1));
    (1..=longest).rev().find(|&n| text.as_bytes().ends_with(&stop.as_bytes()[..n])).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stream(stops: &[&str], pieces: &[&str]) -> (String, bool) {
        let mut watch = StopTexts::new(stops.iter().map(|s| s.to_string()).collect());
        let mut all = String::new();
        for piece in pieces {
            let released = watch.push(piece.to_string());
            all += &released.text;
            if released.stopped {
                return (all, true);
            }
        }
        (all + &watch.finish(), false)
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
    fn text_that_passes_cannot_stop() {
        // Would break: a stop text ends an answer that is still too short, or with text from before it could.
        let mut watch = StopTexts::new(vec!["ab".into()]);
        assert_eq!(watch.pass("ab a".into()), Released { text: "ab a".into(), stopped: false });
        assert_eq!(watch.push("b a".into()), Released { text: "b ".into(), stopped: false });
        assert_eq!(watch.push("b".into()), Released { text: String::new(), stopped: true });
    }

    #[test]
    fn held_text_comes_out_at_the_end() {
        // Would break: an answer that ends like the beginning of a stop text loses its last characters.
        assert_eq!(stream(&["é!"], &["caf", "é"]), ("café".into(), false));
    }
}
