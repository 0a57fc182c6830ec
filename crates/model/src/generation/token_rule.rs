//! What the next token of an answer may be, by its place in the answer. Applied to the logits, as transformers' processors
//! are; the reference and the coordinator choose tokens by the same rule.

use super::GenerationConfig;

/// What the next token may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TokenRule<'a> {
    /// One of these, all as likely. Never empty.
    Forced(&'a [u32]),
    /// Any that is on none of these lists.
    Banned([&'a [u32]; 3]),
}

impl GenerationConfig {
    /// The rule for the token after `written` ones of an answer that has no end of sequence before `tokens_min` tokens and
    /// at most `tokens_max`.
    pub fn token_rule(&self, written: usize, tokens_min: usize, tokens_max: usize) -> TokenRule<'_> {
        if !self.forced_eos_token_ids.is_empty() && written + 1 == tokens_max {
            return TokenRule::Forced(&self.forced_eos_token_ids);
        }
        match self.forced_bos_token_id.as_slice() {
            forced @ [_] if written == 0 => return TokenRule::Forced(forced),
            _ => {}
        }
        let first_free = usize::from(self.forced_bos_token_id.is_some());
        let only_if = |is_so: bool, list| if is_so { list } else { &[][..] };
        TokenRule::Banned([
            &self.suppress_tokens,
            only_if(written == first_free, &self.begin_suppress_tokens),
            only_if(written < tokens_min, &self.eos_token_ids),
        ])
    }
}

impl TokenRule<'_> {
    /// Makes impossible what is against the rule. `logits`: (vocab_size).
    pub fn apply(&self, logits: &mut [f32]) {
        match self {
            Self::Forced(tokens) => {
                logits.fill(f32::NEG_INFINITY);
                tokens.iter().for_each(|&token| logits[token as usize] = 0.0);
            }
            Self::Banned(lists) => {
                lists.iter().copied().flatten().for_each(|&token| logits[token as usize] = f32::NEG_INFINITY);
            }
        }
    }

    /// The one token that is against the rule, if there is one: then the best token can be chosen where the logits are.
    /// `None`: the rule has to be applied to them.
    pub fn banned(&self) -> Option<Option<u32>> {
        let Self::Banned(lists) = self else { return None };
        let mut banned = lists.iter().copied().flatten().copied();
        let one = banned.next();
        banned.all(|other| Some(other) == one).then_some(one)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config() -> GenerationConfig {
        GenerationConfig::plain(0, vec![1, 4])
    }

    /// The tokens that a rule allows among six.
    fn allowed(rule: TokenRule<'_>) -> Vec<usize> {
        let mut logits = [1.0; 6];
        rule.apply(&mut logits);
        (0..6).filter(|&token| logits[token] > f32::NEG_INFINITY).collect()
    }

    /// An answer would end too early, or begin with what it must not.
    #[test]
    fn rules_follow_the_place_in_the_answer() {
        let plain = config();
        assert_eq!(allowed(plain.token_rule(0, 0, 9)), [0, 1, 2, 3, 4, 5]);
        assert_eq!(allowed(plain.token_rule(1, 2, 9)), [0, 2, 3, 5]);
        assert_eq!(allowed(plain.token_rule(2, 2, 9)), [0, 1, 2, 3, 4, 5]);
        let suppressed = GenerationConfig { suppress_tokens: vec![3], begin_suppress_tokens: vec![0, 2], ..config() };
        assert_eq!(allowed(suppressed.token_rule(0, 0, 9)), [1, 4, 5]);
        assert_eq!(allowed(suppressed.token_rule(1, 0, 9)), [0, 1, 2, 4, 5]);
        let forced = GenerationConfig { forced_bos_token_id: Some(5), ..suppressed };
        assert_eq!(forced.token_rule(0, 0, 9), TokenRule::Forced(&[5]));
        assert_eq!(allowed(forced.token_rule(1, 0, 9)), [1, 4, 5], "what begins comes after what is forced");
        assert_eq!(allowed(forced.token_rule(2, 0, 9)), [0, 1, 2, 4, 5]);
        let last = GenerationConfig { forced_eos_token_ids: vec![1, 4], ..forced };
        assert_eq!(allowed(last.token_rule(8, 9, 9)), [1, 4], "even where it would be too early");
        assert_eq!(allowed(last.token_rule(7, 0, 9)), [0, 1, 2, 4, 5]);
        assert_eq!(last.token_rule(0, 0, 1), TokenRule::Forced(&[1, 4]), "of two forced tokens the last wins");
    }

    /// A device would choose a token that is against the rule.
    #[test]
    fn one_banned_token_can_be_left_out_elsewhere() {
        let one = |lists| TokenRule::Banned(lists).banned();
        assert_eq!(one([&[], &[], &[]]), Some(None));
        assert_eq!(one([&[], &[7], &[]]), Some(Some(7)));
        assert_eq!(one([&[7], &[], &[7]]), Some(Some(7)));
        assert_eq!(one([&[7], &[], &[8]]), None);
        assert_eq!(one([&[1, 2], &[], &[]]), None);
        assert_eq!(TokenRule::Forced(&[1]).banned(), None);
    }
}
