//! The prompt of a request, as a caller gives it: a text, or the ids of its tokens.

/// What is answered, scored or encoded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Prompt {
    /// A text. The model's tokenizer makes tokens of it, with what a text of the model begins and ends with.
    Text(String),
    /// Tokens of the vocabulary, taken as they are: nothing is put before or behind them.
    Tokens(Vec<u32>),
}

impl Prompt {
    /// How many bytes are to be tokenized.
    pub(crate) fn text_bytes(&self) -> usize {
        match self {
            Self::Text(text) => text.len(),
            Self::Tokens(_) => 0,
        }
    }
}

impl Default for Prompt {
    fn default() -> Self {
        Self::Text(String::new())
    }
}

impl From<String> for Prompt {
    fn from(text: String) -> Self {
        Self::Text(text)
    }
}

impl From<&str> for Prompt {
    fn from(text: &str) -> Self {
        Self::Text(text.to_owned())
    }
}

impl From<Vec<u32>> for Prompt {
    fn from(tokens: Vec<u32>) -> Self {
        Self::Tokens(tokens)
    }
}

/// The tokens of a prompt, within the limits.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PromptTokens {
    /// Invariant: not empty, every id within the vocabulary.
    pub ids: Vec<u32>,
    /// How many there were beyond the limit, which were cut off.
    pub truncated: usize,
}

/// Cuts tokens to a limit of at least one. An end of sequence, which an encoder's texts have, stays the last.
pub fn cut(mut ids: Vec<u32>, limit: usize, is_end: impl Fn(u32) -> bool) -> PromptTokens {
    let truncated = ids.len().saturating_sub(limit);
    let end = ids.last().copied().filter(|&last| truncated > 0 && is_end(last));
    ids.truncate(limit);
    if let (Some(end), Some(last)) = (end, ids.last_mut()) {
        *last = end;
    }
    PromptTokens { ids, truncated }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cut_keeps_the_end() {
        // Would break: an encoder reads a text without its end, or more tokens than the limit.
        let cut = |ids: &[u32], limit| {
            let PromptTokens { ids, truncated } = cut(ids.to_vec(), limit, |id| id == 1);
            (ids, truncated)
        };
        assert_eq!(cut(&[5, 6, 7, 1], 4), (vec![5, 6, 7, 1], 0));
        assert_eq!(cut(&[5, 6, 7, 1], 3), (vec![5, 6, 1], 1));
        assert_eq!(cut(&[5, 6, 7, 8], 2), (vec![5, 6], 2));
        assert_eq!(cut(&[5, 1], 1), (vec![1], 1));
    }
}
