//! What a predictor learns from: the user's text, a line an example.

use std::collections::BTreeSet;

/// One example.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Text {
    /// What goes into the encoder.
    pub input: String,
    /// What the decoder is made to write; without it, the model answers by itself.
    pub target: Option<String>,
}

impl Text {
    /// A line, `input` or `input<TAB>target`; `None` of a blank one.
    pub fn of_line(line: &str) -> Option<Self> {
        let (input, target) = line.split_once('\t').map_or((line, None), |(input, target)| (input, Some(target)));
        let input = input.trim();
        let target = target.map(str::trim).filter(|target| !target.is_empty()).map(str::to_owned);
        (!input.is_empty()).then(|| Self { input: input.to_owned(), target })
    }
}

/// Examples to learn from, and others to measure with.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Texts {
    /// To learn from.
    pub train: Vec<Text>,
    /// To measure with; no input of these is in `train`.
    pub held_out: Vec<Text>,
}

impl Texts {
    /// Holds out every n-th distinct input. An input that occurs several times is on one side only: measured on
    /// what it has learnt, any predictor is good.
    pub fn split(lines: &str, held_out_every: usize) -> Self {
        let mut texts = Self::default();
        let mut seen = BTreeSet::new();
        let distinct = lines.lines().filter_map(Text::of_line).filter(|text| seen.insert(text.input.clone()));
        for (n, text) in distinct.enumerate() {
            let side = if n % held_out_every.max(2) == 0 { &mut texts.held_out } else { &mut texts.train };
            side.push(text);
        }
        texts
    }

    /// With the lines to measure with given apart. Inputs that are in both are only measured with.
    pub fn of(train: &str, held_out: &str) -> Self {
        let held_out: Vec<Text> = held_out.lines().filter_map(Text::of_line).collect();
        let known: BTreeSet<&str> = held_out.iter().map(|text| text.input.as_str()).collect();
        let train =
            train.lines().filter_map(Text::of_line).filter(|text| !known.contains(text.input.as_str())).collect();
        Self { train, held_out }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Hit rates would be measured on text that was learnt.
    #[test]
    fn no_input_is_on_both_sides() {
        let lines = "a\tx\nb\n\na\ty\nc\n  \nd\nb";
        let texts = Texts::split(lines, 2);
        let inputs = |texts: &[Text]| texts.iter().map(|text| text.input.clone()).collect::<Vec<_>>();
        assert_eq!(
            (inputs(&texts.held_out), inputs(&texts.train)),
            (vec!["a".into(), "c".into()], vec!["b".into(), "d".into()])
        );
        assert_eq!(texts.held_out[0].target.as_deref(), Some("x"));
        assert_eq!(inputs(&Texts::of(lines, "b\nz").train), ["a", "a", "c", "d"]);
    }
}
