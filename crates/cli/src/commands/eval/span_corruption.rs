//! T5's span corruption by words: some spans of a text are hidden behind sentinels, and the answer names each sentinel and
//! what it hides. What a model of this family was trained to do, so that its perplexity on any text can be told.

use rand::{SeedableRng, seq::index};
use rand_chacha::ChaCha8Rng;

/// This share of the words is hidden.
const SHARE_HIDDEN: f64 = 0.15;
/// Words of a span.
const SPAN_WORDS: usize = 3;
/// Longer texts are cut: a model's training knew a few spans only.
const WORDS_MAX: usize = 90;
/// Of fewer words none can be hidden with some left to tell by.
pub(crate) const WORDS_MIN: usize = 2 * SPAN_WORDS;

/// A text with gaps, and what was in them. The same seed hides the same words. `None` if there are too few words.
pub(crate) fn corrupt(text: &str, seed: u64) -> Option<(String, String)> {
    let words: Vec<&str> = text.split_whitespace().take(WORDS_MAX).collect();
    if words.len() < WORDS_MIN {
        return None;
    }
    let spans = ((words.len() as f64 * SHARE_HIDDEN / SPAN_WORDS as f64).round() as usize).max(1);
    // Spans begin at multiples of a span and a word, so that a word is left between any two.
    let places = (words.len() - SPAN_WORDS) / (SPAN_WORDS + 1) + 1;
    let mut starts = index::sample(&mut ChaCha8Rng::seed_from_u64(seed), places, spans.min(places)).into_vec();
    starts.sort_unstable();
    let (mut shown, mut hidden, mut at) = (Vec::new(), Vec::new(), 0);
    for (number, place) in starts.into_iter().enumerate() {
        let (start, sentinel) = (place * (SPAN_WORDS + 1), format!("<extra_id_{number}>"));
        shown.extend(words[at..start].iter().map(|word| (*word).to_owned()));
        shown.push(sentinel.clone());
        hidden.push(sentinel);
        hidden.extend(words[start..start + SPAN_WORDS].iter().map(|word| (*word).to_owned()));
        at = start + SPAN_WORDS;
    }
    shown.extend(words[at..].iter().map(|word| (*word).to_owned()));
    Some((shown.join(" "), hidden.join(" ")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_word_is_shown_or_hidden_once() {
        // Would break: the perplexity is that of texts whose gaps cannot be filled, or of other texts from run to run.
        for words in WORDS_MIN..=120 {
            let text = (0..words).map(|word| format!("w{word}")).collect::<Vec<_>>().join("  ");
            let (shown, hidden) = corrupt(&text, words as u64).unwrap();
            assert_eq!(corrupt(&text, words as u64), Some((shown.clone(), hidden.clone())));
            let mut answers = hidden.split("<extra_id_").skip(1).map(|part| part.split_once('>').unwrap());
            let mut whole = Vec::new();
            for word in shown.split(' ') {
                match word.strip_prefix("<extra_id_") {
                    Some(sentinel) => {
                        let (number, span) = answers.next().unwrap();
                        assert_eq!(sentinel, format!("{number}>"));
                        assert_eq!(span.split_whitespace().count(), SPAN_WORDS);
                        whole.extend(span.split_whitespace());
                    }
                    None => whole.push(word),
                }
            }
            assert_eq!(answers.next(), None);
            assert_eq!(whole, text.split_whitespace().take(WORDS_MAX).collect::<Vec<_>>());
            assert!(!shown.contains("> <"), "a gap beside a gap: {shown}");
        }
    }

    #[test]
    fn about_a_sixth_is_hidden_and_differs_by_seed() {
        // Would break: the task is easier or harder than the one that the model was trained for, or a seed is no seed.
        let text = vec!["word"; 80].join(" ");
        let hidden = |seed| corrupt(&text, seed).unwrap().1;
        assert_eq!(hidden(0).matches("word").count(), 12);
        assert_ne!(corrupt(&text, 0), corrupt(&text, 1));
        assert_eq!(corrupt("too few words to hide", 0), None);
    }
}
