//! What an expert that no plan names is worth keeping: how often it was used, a use counting half as much after so
//! many further uses of any expert. It lies between "longest unused" and "least often used", and is known as LRFU
//! (Lee et al., IEEE Trans. Computers 50(12), 2001). Experts are kept in mind when they leave: what is used again and
//! again is kept although every request touches more experts than there are slots. Owned by [`super::Residency`].
//!
//! Everything decays alike, so an expert's worth relative to others changes only when it is used. It is held as
//! `log2(sum over its uses of 2^(time of the use / half-life))`, which grows with time instead of all others decaying.

use super::KeyIndex;

/// A use counts half after so many uses per slot. From 2 to 16 the loads of the model that ships differ by a tenth.
const HALF_LIFE_PER_SLOT: usize = 8;
/// Steps of [`Worth::of`] per doubling: uses that follow each other are told apart with up to 100,000 slots.
const STEPS: f64 = (1 << 20) as f64;

/// What every expert is worth by how often and how lately it was used.
#[derive(Debug)]
pub(super) struct Worth {
    /// Per expert; minus infinity if it was never used.
    doublings: Vec<f64>,
    uses: u64,
    half_life: f64,
}

impl Worth {
    pub(super) fn new(keys: usize, slots: usize) -> Self {
        let half_life = (HALF_LIFE_PER_SLOT * slots.max(1)) as f64;
        Self { doublings: vec![f64::NEG_INFINITY; keys], uses: 0, half_life }
    }

    /// An expert is used.
    pub(super) fn used(&mut self, key: KeyIndex) {
        self.uses += 1;
        let (before, now) = (self.doublings[key], self.uses as f64 / self.half_life);
        // log2(2^before + 2^now), by the larger of them: neither power need exist.
        let (small, large) = (before.min(now), before.max(now));
        self.doublings[key] = large + (1.0 + (small - large).exp2()).log2();
    }

    /// What it is worth; 0 if it was never used.
    pub(super) fn of(&self, key: KeyIndex) -> u64 {
        // Never used: saturates to 0.
        (self.doublings[key] * STEPS) as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A burst long ago would keep an expert for ever, or one use would outweigh many.
    #[test]
    fn often_counts_until_it_is_long_ago() {
        let mut worth = Worth::new(4, 1);
        (0..3).for_each(|_| worth.used(0));
        worth.used(1);
        assert!(worth.of(0) > worth.of(1), "three uses outweigh a later one");
        (0..64).for_each(|_| worth.used(2));
        worth.used(1);
        assert!(worth.of(1) > worth.of(0), "eight half-lives later one use outweighs three");
        assert_eq!(worth.of(3), 0);
    }
}
