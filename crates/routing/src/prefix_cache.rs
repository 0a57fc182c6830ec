//! Sequences that are over, kept for prompts that begin as they did: chats resend their history with each turn, and many
//! prompts begin with the same instructions. What is found here need not be computed again.
//!
//! Entries are few, since each holds the keys and values of a whole sequence, so that token lists are compared one after
//! another. Clients never see each other's: how fast an answer begins would tell what others have asked.

/// As many sequences are kept at most, however little memory they take: it bounds how long a prompt is looked for.
pub const ENTRIES_MAX: usize = 256;

/// A shorter beginning is not worth being kept or looked for: it is what a chat template puts before every prompt.
pub const TOKENS_MIN: usize = 16;

/// A sequence that is over.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Kept<C, S> {
    /// Whose it was.
    pub client: C,
    /// The tokens whose keys and values it has.
    pub tokens: Vec<u32>,
    /// The memory that these take.
    pub bytes: u64,
    /// The keys and values.
    pub sequence: S,
}

/// What is kept.
///
/// Invariant: no entry's tokens begin another entry's of the same client.
#[derive(Clone, Debug)]
pub struct PrefixCache<C, S> {
    /// From the least recently used to the most.
    entries: Vec<Kept<C, S>>,
    bytes: u64,
}

impl<C, S> Default for PrefixCache<C, S> {
    fn default() -> Self {
        Self { entries: Vec::new(), bytes: 0 }
    }
}

impl<C: PartialEq, S> PrefixCache<C, S> {
    /// Memory that the entries take.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Whether nothing is kept.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Keeps a sequence, unless another entry holds all of it already, in place of those that it holds itself.
    pub fn keep(&mut self, kept: Kept<C, S>) {
        if kept.tokens.len() < TOKENS_MIN {
            return;
        }
        let holds =
            |all: &Kept<C, S>, part: &Kept<C, S>| all.client == part.client && all.tokens.starts_with(&part.tokens);
        if let Some(at) = self.entries.iter().position(|entry| holds(entry, &kept)) {
            return self.touch(at);
        }
        let leaving = self.entries.extract_if(.., |entry| holds(&kept, entry));
        self.bytes -= leaving.map(|entry| entry.bytes).sum::<u64>();
        self.bytes += kept.bytes;
        self.entries.push(kept);
        if self.entries.len() > ENTRIES_MAX {
            self.drop_oldest();
        }
    }

    /// Lets entries leave until they take `bytes_max` at most, the least recently used first.
    pub fn shrink_to(&mut self, bytes_max: u64) {
        while self.bytes > bytes_max {
            self.drop_oldest();
        }
    }

    /// The entry of a client that shares the most tokens with the beginning of a `prompt`, with how many these are. It counts
    /// as used; then others leave, and if need be itself, until all take `bytes_max` at most.
    pub fn find(&mut self, client: &C, prompt: &[u32], bytes_max: u64) -> Option<(usize, &S)> {
        let own = self.entries.iter().enumerate().filter(|(_, entry)| entry.client == *client);
        let longest = own.map(|(at, entry)| (shared(&entry.tokens, prompt), at)).max();
        let longest = longest.filter(|&(tokens, _)| tokens >= TOKENS_MIN);
        if let Some((_, at)) = longest {
            self.touch(at);
        }
        self.shrink_to(bytes_max);
        let (tokens, _) = longest?;
        Some((tokens, &self.entries.last()?.sequence))
    }

    fn touch(&mut self, at: usize) {
        self.entries[at..].rotate_left(1);
    }

    fn drop_oldest(&mut self) {
        self.bytes -= self.entries.remove(0).bytes;
    }
}

/// How many tokens two runs of them have in common at their beginning.
pub fn shared(one: &[u32], other: &[u32]) -> usize {
    one.iter().zip(other).take_while(|(one, other)| one == other).count()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// So many tokens that begin with the same 16 and go on by `branch`.
    fn tokens(branch: u32, count: usize) -> Vec<u32> {
        (0..count as u32).map(|at| if at < 16 { at } else { 100 * branch + at }).collect()
    }

    fn kept(client: u8, branch: u32, count: usize, name: usize) -> Kept<u8, usize> {
        Kept { client, tokens: tokens(branch, count), bytes: count as u64, sequence: name }
    }

    fn names(cache: &PrefixCache<u8, usize>) -> Vec<usize> {
        cache.entries.iter().map(|entry| entry.sequence).collect()
    }

    #[test]
    fn the_longest_beginning_is_found() {
        // Would break: a turn of a chat reuses the system prompt alone, or what another client has asked.
        let mut cache = PrefixCache::default();
        cache.keep(kept(1, 1, 40, 0));
        cache.keep(kept(1, 2, 60, 1));
        cache.keep(kept(2, 3, 50, 2));
        assert_eq!(cache.find(&1, &tokens(1, 50), 200), Some((40, &0)));
        assert_eq!(cache.find(&1, &tokens(1, 30), 200), Some((30, &0)), "a part of what is kept");
        assert_eq!(cache.find(&1, &tokens(3, 50), 200), Some((16, &0)), "another client's is not seen");
        assert_eq!(cache.find(&3, &tokens(3, 50), 200), None);
        assert_eq!(cache.find(&1, &tokens(1, 15), 200), None, "too short to be worth it");
        assert_eq!(names(&cache), [1, 2, 0]);
    }

    #[test]
    fn a_later_turn_takes_the_place_of_the_earlier() {
        // Would break: each turn of a chat is kept beside the turns before it, which it holds, and others leave for that.
        let mut cache = PrefixCache::default();
        for (turn, count) in [20, 30, 40, 30].into_iter().enumerate() {
            cache.keep(kept(1, 1, count, turn));
        }
        cache.keep(kept(2, 1, 20, 9));
        assert_eq!((names(&cache), cache.bytes()), (vec![2, 9], 60));
        cache.keep(kept(1, 2, 15, 4));
        assert_eq!(names(&cache), [2, 9], "too short to be worth it");
    }

    #[test]
    fn what_is_found_leaves_last() {
        // Would break: a prompt makes the room that it needs of the very entry that it begins with.
        let mut cache = PrefixCache::default();
        (0..3).for_each(|number| cache.keep(kept(1, number as u32, 30, number)));
        assert_eq!(cache.find(&1, &tokens(0, 40), 45), Some((30, &0)));
        assert_eq!(names(&cache), [0]);
        assert_eq!(cache.find(&1, &tokens(0, 40), 29), None);
        assert!(cache.is_empty() && cache.bytes() == 0);
    }

    /// An entry of the model: with when it was used last.
    struct Known {
        used: usize,
        kept: Kept<u8, usize>,
    }

    fn oldest(known: &mut Vec<Known>) {
        let oldest = known.iter().map(|one| one.used).min();
        known.retain(|one| Some(one.used) != oldest);
    }

    fn total(known: &[Known]) -> u64 {
        known.iter().map(|one| one.kept.bytes).sum()
    }

    proptest! {
        #[test]
        fn it_does_as_the_obvious_model(
            steps in prop::collection::vec(
                // Few tokens in few branches, so that some begin as others do.
                (0u8..3, 0u8..2, prop::collection::vec(0u32..2, 0..6), 0usize..30, 0u64..400),
                1..80,
            ),
        ) {
            // Would break: what is still wanted leaves, memory is counted wrongly, or a prompt is answered from other tokens.
            let (mut cache, mut known) = (PrefixCache::default(), Vec::<Known>::new());
            for (now, (what, client, turns, more, bytes)) in steps.into_iter().enumerate() {
                let mut tokens: Vec<u32> = turns.iter().flat_map(|&turn| std::iter::repeat_n(turn, 10)).collect();
                tokens.extend(std::iter::repeat_n(7, more));
                match what {
                    0 => {
                        let kept = Kept { client, tokens: tokens.clone(), bytes: bytes / 4, sequence: now };
                        cache.keep(kept.clone());
                        let begins = |part: &[u32], all: &[u32]| all.len() >= part.len() && all[..part.len()] == *part;
                        let own = |one: &Known| one.kept.client == client;
                        if tokens.len() < TOKENS_MIN {
                        } else if let Some(one) = known.iter_mut().find(|one| own(one) && begins(&tokens, &one.kept.tokens)) {
                            one.used = now;
                        } else {
                            known.retain(|one| !own(one) || !begins(&one.kept.tokens, &tokens));
                            known.push(Known { used: now, kept });
                        }
                    }
                    1 => {
                        let found = cache.find(&client, &tokens, bytes).map(|(count, &name)| (count, name));
                        let count = |one: &Known| {
                            (0..=tokens.len()).rev().find(|&n| one.kept.tokens.get(..n) == Some(&tokens[..n])).unwrap_or(0)
                        };
                        let own = known.iter_mut().filter(|one| one.kept.client == client);
                        let best = own.max_by_key(|one| (count(one), one.used)).filter(|one| count(one) >= TOKENS_MIN);
                        let expected = best.map(|one| {
                            one.used = now;
                            (count(one), one.kept.sequence)
                        });
                        while total(&known) > bytes {
                            oldest(&mut known);
                        }
                        let is_there = |&(_, name): &(usize, usize)| known.iter().any(|one| one.kept.sequence == name);
                        prop_assert_eq!(found, expected.filter(is_there));
                    }
                    _ => {
                        cache.shrink_to(bytes);
                        while total(&known) > bytes {
                            oldest(&mut known);
                        }
                    }
                }
                known.sort_by_key(|one| one.used);
                prop_assert_eq!(&cache.entries, &known.iter().map(|one| one.kept.clone()).collect::<Vec<_>>());
                prop_assert_eq!(cache.bytes(), total(&known));
            }
        }
    }

    #[test]
    fn entries_are_bounded() {
        // Would break: a small model keeps so many sequences that looking through them costs more than computing.
        let mut cache = PrefixCache::default();
        for number in 0..ENTRIES_MAX + 10 {
            cache.keep(kept(1, number as u32, 20, number));
        }
        assert_eq!((cache.entries.len(), cache.entries[0].sequence), (ENTRIES_MAX, 10));
        assert_eq!(cache.bytes(), 20 * ENTRIES_MAX as u64);
    }
}
