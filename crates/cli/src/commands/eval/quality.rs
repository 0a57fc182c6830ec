//! How good the answers of a mode are: accuracy, how many are the model's own, perplexity.

use serde::Serialize;

use crate::commands::eval::{
    answered::Answered,
    task::{Example, Wanted},
};

/// Of examples with choices.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub(crate) struct Choices {
    pub(crate) examples: usize,
    /// The share that was answered rightly.
    pub(crate) accuracy: f64,
    /// The share whose answer is that of `exact`, right or wrong: fidelity.
    pub(crate) unchanged: f64,
}

/// Of examples with a text that follows.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub(crate) struct Perplexity {
    pub(crate) examples: usize,
    pub(crate) tokens: usize,
    /// e to the mean over tokens of -ln p.
    pub(crate) perplexity: f64,
}

/// Of the answers of a mode; what there are no examples for is `None`.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub(crate) struct Quality {
    pub(crate) choices: Option<Choices>,
    pub(crate) target: Option<Perplexity>,
}

impl Quality {
    /// Of answers to examples, held against those of mode `exact`. All three are parallel.
    pub(crate) fn of(examples: &[Example], answers: &[Answered], exact: &[Answered]) -> Self {
        let (mut asked, mut right, mut unchanged) = (0, 0, 0);
        let (mut targets, mut tokens, mut log_likelihood) = (0, 0, 0.0);
        for ((example, answer), exact) in examples.iter().zip(answers).zip(exact) {
            match example.wanted {
                Wanted::Choice(_, label) => {
                    asked += 1;
                    right += usize::from(answer.choice() == label);
                    unchanged += usize::from(answer.choice() == exact.choice());
                }
                Wanted::Target(_) => {
                    targets += 1;
                    tokens += answer.scores.iter().map(|score| score.tokens).sum::<usize>();
                    log_likelihood += answer.scores.iter().map(|score| score.log_likelihood).sum::<f64>();
                }
            }
        }
        let share = |count: usize| count as f64 / asked as f64;
        let choices = Choices { examples: asked, accuracy: share(right), unchanged: share(unchanged) };
        let perplexity = (-log_likelihood / tokens as f64).exp();
        Self {
            choices: (asked > 0).then_some(choices),
            target: (tokens > 0).then_some(Perplexity { examples: targets, tokens, perplexity }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::commands::eval::{answered::tests::answered, record::Place};

    fn example(wanted: Wanted) -> Example {
        Example { place: Place { file: "data".into(), line: 1 }, prompt: "x".into(), wanted }
    }

    fn choice(label: usize) -> Example {
        example(Wanted::Choice(vec!["a".into(), "b".into()], label))
    }

    #[test]
    fn answers_are_right_or_unchanged_or_neither() {
        // Would break: accuracy and fidelity, the figures of the paper, are counted wrongly.
        let examples = [choice(0), choice(1), choice(1), choice(0)];
        let exact = [[-1.0, -2.0], [-1.0, -2.0], [-2.0, -1.0], [-1.0, -2.0]].map(|scores| answered(&scores));
        let other = [[-1.0, -9.0], [-9.0, -1.0], [-1.0, -2.0], [-5.0, -9.0]].map(|scores| answered(&scores));
        let of = |answers| Quality::of(&examples, answers, &exact).choices.unwrap();
        assert_eq!(of(&exact), Choices { examples: 4, accuracy: 0.75, unchanged: 1.0 });
        assert_eq!(of(&other), Choices { examples: 4, accuracy: 0.75, unchanged: 0.5 });
    }

    #[test]
    fn perplexity_is_over_all_tokens() {
        // Would break: long and short texts count alike, or the perplexity is not e to the mean.
        let examples = [example(Wanted::Target("x".into())), example(Wanted::Target("y".into()))];
        let mut answers = [answered(&[-1.0]), answered(&[-11.0])];
        answers[1].scores[0].tokens = 4;
        let found = Quality::of(&examples, &answers, &answers).target.unwrap();
        assert_eq!((found.examples, found.tokens), (2, 6));
        assert!((found.perplexity - 2.0f64.exp()).abs() < 1e-12, "{found:?}");
    }

    #[test]
    fn kinds_of_examples_are_counted_apart() {
        // Would break: a share of nothing is told as a number, or the choices of one example count towards perplexity.
        let (both, answers) =
            ([choice(1), example(Wanted::Target("x".into()))], [answered(&[-1.0, -2.0]), answered(&[-2.0])]);
        let found = Quality::of(&both, &answers, &answers);
        assert_eq!(found.choices.unwrap(), Choices { examples: 1, accuracy: 0.0, unchanged: 1.0 });
        assert_eq!(found.target.unwrap().tokens, 2);
        assert_eq!(Quality::of(&both[..1], &answers, &answers).target, None);
        assert_eq!(Quality::of(&both[1..], &answers[1..], &answers[1..]).choices, None);
    }
}
