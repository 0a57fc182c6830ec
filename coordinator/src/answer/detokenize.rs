//! The text that each new token adds to an answer. All of these texts, one after another, are exactly the text of all
//! tokens decoded at once.
//!
//! Decoding a token by itself is wrong (its leading space is lost, a character may be spread over tokens), and
//! decoding everything again for each token costs the square of the length. So a short window is decoded: from
//! the last token whose text was given out to the newest, and the new text is what the window gained.

/// The text of one growing sequence.
#[derive(Default)]
pub(crate) struct Detokenizer {
    /// The window. Invariant: its first token has a text of its own, or the window reaches back to the
    /// sequence's beginning; a special token without text in front would take the next one's space.
    window: Vec<u32>,
    /// Bytes of the window's text that were given out.
    given: usize,
}

impl Detokenizer {
    /// Adds a token; returns the text it adds, empty within a character. `decode` is the tokenizer's.
    pub(crate) fn push<E>(&mut self, token: u32, decode: impl Fn(&[u32]) -> Result<String, E>) -> Result<String, E> {
        self.window.push(token);
        let text = decode(&self.window)?;
        // A character whose bytes have not all come yet decodes to the replacement character.
        if text.ends_with('\u{fffd}') || !text.is_char_boundary(self.given.min(text.len())) {
            return Ok(String::new());
        }
        let added = text.get(self.given..).unwrap_or_default().to_owned();
        self.given = text.len();
        let own = decode(&[token])?;
        if !own.is_empty() && !own.ends_with('\u{fffd}') && self.window.len() > 1 {
            self.window = vec![token];
            self.given = own.len();
        }
        Ok(added)
    }

    /// The sequence ended: text that waited for the rest of a character.
    pub(crate) fn finish<E>(&mut self, decode: impl Fn(&[u32]) -> Result<String, E>) -> Result<String, E> {
        let text = decode(&self.window)?;
        let rest = text.get(self.given..).unwrap_or_default().to_owned();
        self.given = text.len();
        Ok(rest)
    }
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use proptest::prelude::*;

    use super::*;

    /// A metaspace decoder with byte pieces: "▁" is a space, lost at the beginning of what is decoded; token 0
    /// is special and has no text; from 128 on they are single bytes.
    fn decode(tokens: &[u32]) -> Result<String, Infallible> {
        const PIECES: [&str; 7] = ["", "▁a", "b", "▁", "▁é", "<extra_id_0>", "▁▁x"];
        let mut bytes = Vec::new();
        let mut first = true;
        for &token in tokens.iter().filter(|&&t| t != 0) {
            if token >= 128 {
                bytes.push(token as u8);
            } else {
                let piece = PIECES[token as usize];
                let piece = if first { piece.strip_prefix('▁').unwrap_or(piece) } else { piece };
                bytes.extend(piece.replace('▁', " ").bytes());
            }
            first = false;
        }
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }

    fn stream(tokens: &[u32]) -> String {
        let mut detokenizer = Detokenizer::default();
        let Ok(streamed) = tokens.iter().map(|&token| detokenizer.push(token, decode)).collect::<Result<String, _>>();
        let Ok(rest) = detokenizer.finish(decode);
        streamed + &rest
    }

    #[test]
    fn characters_over_several_tokens() {
        // Would break: half a character is streamed as a replacement character.
        let euro = "€".as_bytes().iter().map(|&b| u32::from(b));
        let tokens: Vec<u32> = [1, 3].into_iter().chain(euro).chain([2]).collect();
        assert_eq!(stream(&tokens), "a €b");
        let mut detokenizer = Detokenizer::default();
        assert_eq!(detokenizer.push(0xe2, decode), Ok(String::new()));
    }

    proptest! {
        #[test]
        fn pieces_are_the_whole(tokens in prop::collection::vec(0u32..7, 0..30)) {
            // Would break: a streamed answer differs from the same answer decoded at once.
            prop_assert_eq!(Ok(stream(&tokens)), decode(&tokens));
        }
    }
}
