//! Routes that a model was seen to take, token by token: what a replay has in the place of a router's choice, so that
//! residency and speed can be measured under the locality of real texts whatever the weights are. Read from a file by the
//! command line; replayed by a coordinator, and by the evaluation of residency.

use crate::{ExpertId, LayerId};

/// Which part of a recording.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Phase {
    /// The tokens of prompts.
    Prompt,
    /// The tokens that were generated.
    Decoding,
}

/// The experts of a token at each MoE layer, the likeliest first; none at a layer where the token was not computed, as tokens of a
/// prompt are not at the last one if nobody asks for what comes of them.
pub type TokenRoutes = Vec<Vec<ExpertId>>;

/// The experts of each recorded token.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RecordedRoutes {
    layers: usize,
    /// The tokens of prompts.
    prompt: Vec<TokenRoutes>,
    /// The tokens that were generated.
    decoding: Vec<TokenRoutes>,
}

impl RecordedRoutes {
    /// The tokens of either phase, in order. `None` unless there is one at least, and all have the same layers.
    pub fn new(prompt: Vec<TokenRoutes>, decoding: Vec<TokenRoutes>) -> Option<Self> {
        let layers = prompt.first().or(decoding.first()).map(Vec::len).filter(|&layers| layers > 0)?;
        let is_whole = prompt.iter().chain(&decoding).all(|token| token.len() == layers);
        is_whole.then_some(Self { layers, prompt, decoding })
    }

    /// MoE layers.
    pub fn layers(&self) -> usize {
        self.layers
    }

    /// The most experts that a token has at a layer.
    pub fn top_k(&self) -> usize {
        self.each().map(Vec::len).max().unwrap_or(0)
    }

    /// One more than the highest expert that is named.
    pub fn num_experts(&self) -> usize {
        self.each().flatten().map(|expert| usize::from(expert.0) + 1).max().unwrap_or(0)
    }

    /// How many tokens a phase has.
    pub fn tokens(&self, phase: Phase) -> usize {
        self.of(phase).len()
    }

    /// The experts of a token, which must be there, at a layer: the likeliest first.
    pub fn experts(&self, phase: Phase, token: usize, layer: LayerId) -> &[ExpertId] {
        &self.of(phase)[token][usize::from(layer.0)]
    }

    /// The experts at a layer of the token in a `place` of a sequence, whose first `prompt_tokens` are its prompt. Sequences
    /// of other numbers begin at other places of the recording, far from each other; what is at its end goes on at its
    /// beginning. A phase without tokens has those of the other.
    pub fn of_sequence(&self, number: u64, place: usize, prompt_tokens: usize, layer: LayerId) -> &[ExpertId] {
        let (phase, other, place) = match place.checked_sub(prompt_tokens) {
            None => (Phase::Prompt, Phase::Decoding, place),
            Some(place) => (Phase::Decoding, Phase::Prompt, place),
        };
        let phase = if self.tokens(phase) > 0 { phase } else { other };
        let tokens = self.tokens(phase) as u64;
        // The golden ratio: however many sequences there are, they are spread over all of it.
        let stride = (tokens * 618 / 1000).max(1);
        let start = (number % tokens) * stride;
        self.experts(phase, ((start + place as u64) % tokens) as usize, layer)
    }

    /// Every token at every layer.
    fn each(&self) -> impl Iterator<Item = &Vec<ExpertId>> {
        self.prompt.iter().chain(&self.decoding).flatten()
    }

    fn of(&self, phase: Phase) -> &[TokenRoutes] {
        match phase {
            Phase::Prompt => &self.prompt,
            Phase::Decoding => &self.decoding,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    /// Two layers of two experts; token t of the prompt has expert 10t + 2l + k, one that was generated 100 more.
    fn recorded(prompt: u16, decoding: u16) -> RecordedRoutes {
        let token = |first: u16| {
            vec![vec![ExpertId(first), ExpertId(first + 1)], vec![ExpertId(first + 2), ExpertId(first + 3)]]
        };
        let tokens = |count: u16, first: u16| (0..count).map(|number| token(first + 10 * number)).collect();
        RecordedRoutes::new(tokens(prompt, 0), tokens(decoding, 100)).expect("whole tokens")
    }

    fn first_expert(recorded: &RecordedRoutes, number: u64, place: usize, prompt_tokens: usize) -> u16 {
        recorded.of_sequence(number, place, prompt_tokens, LayerId(0))[0].0
    }

    #[test]
    fn a_token_has_its_own_experts_of_each_layer() {
        // Would break: a layer is replayed with the experts of another, or a token with those of the one beside it.
        let recorded = recorded(3, 5);
        assert_eq!((recorded.tokens(Phase::Prompt), recorded.tokens(Phase::Decoding)), (3, 5));
        assert_eq!(recorded.experts(Phase::Prompt, 2, LayerId(1)), [22, 23].map(ExpertId));
        assert_eq!(recorded.experts(Phase::Decoding, 4, LayerId(0)), [140, 141].map(ExpertId));
        assert_eq!((recorded.layers(), recorded.top_k(), recorded.num_experts()), (2, 2, 144));
    }

    #[test]
    fn a_sequence_goes_through_the_recording_and_around() {
        // Would break: a generated token has the experts of a prompt, or a sequence longer than the recording ends the node.
        let recorded = recorded(3, 5);
        let of_first: Vec<_> = (0..14).map(|place| first_expert(&recorded, 0, place, 4)).collect();
        assert_eq!(of_first, [0, 10, 20, 0, 100, 110, 120, 130, 140, 100, 110, 120, 130, 140]);
    }

    #[test]
    fn sequences_are_spread_over_the_recording() {
        // Would break: sequences of a batch all use the same experts, or nearly so, and a batch needs hardly more of them than
        // one sequence does.
        let recorded = recorded(0, 128);
        let starts: Vec<u16> = (0..128).map(|number| first_expert(&recorded, number, 0, 0)).collect();
        assert_eq!(starts.iter().collect::<BTreeSet<_>>().len(), 128);
        assert!(starts.windows(2).all(|two| two[0].abs_diff(two[1]) >= 200), "neighbours are apart: {starts:?}");
        assert_eq!(first_expert(&recorded, u64::MAX, usize::MAX / 2, 0) % 10, 0, "no number is too large");
    }

    #[test]
    fn a_phase_that_was_not_recorded_has_the_experts_of_the_other() {
        // Would break: a recording without prompts divides by zero.
        assert_eq!(first_expert(&recorded(0, 5), 0, 1, 4), 110);
        assert_eq!(first_expert(&recorded(3, 0), 0, 5, 4), 10);
    }

    #[test]
    fn half_tokens_are_refused() {
        // Would break: a recording that was cut off is replayed with the layers of one token for those of another.
        let token = |layers: usize| vec![vec![ExpertId(0)]; layers];
        assert!(RecordedRoutes::new(vec![token(2)], vec![token(2), token(1)]).is_none());
        assert!(RecordedRoutes::new(Vec::new(), Vec::new()).is_none());
        assert!(RecordedRoutes::new(vec![token(0)], Vec::new()).is_none());
        assert!(RecordedRoutes::new(vec![vec![Vec::new()]], Vec::new()).is_some(), "a layer may have none");
    }
}
