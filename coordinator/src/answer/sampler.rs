//! Chooses the next token from logits: greedily, or drawn after temperature, top-k, top-p and min-p.

use rand::Rng as _;

use crate::answer::{adjustments::Adjustments, sampling::SamplerSettings};

/// One sequence's sampler: its settings and the state of its draws.
/// Invariant: a draw depends on the seed, the draws before it and the logits only, never on the batch.
pub(crate) struct Sampler {
    settings: SamplerSettings,
    adjustments: Option<Adjustments>,
    draws: SplitMix64,
}

impl Sampler {
    /// Of a sequence that goes on from these tokens of the decoder.
    pub(crate) fn new(settings: SamplerSettings, decoder_tokens: &[u32]) -> Self {
        let draws = SplitMix64(settings.seed.unwrap_or_else(|| rand::rng().random()));
        let adjustments = Adjustments::new(&settings, decoder_tokens);
        Self { settings, adjustments, draws }
    }

    /// Whether the sampler always takes the most likely token, as the model's logits are.
    pub(crate) fn is_greedy(&self) -> bool {
        self.settings.temperature <= 0.0 && self.adjustments.is_none()
    }

    /// Changes logits by the bias and the penalties of the request; before tokens are ruled out, and once a step.
    pub(crate) fn adjust(&self, logits: &mut [f32]) {
        if let Some(adjustments) = &self.adjustments {
            adjustments.apply(&self.settings, logits);
        }
    }

    /// The next token, never one whose logit is -inf. `None` when no other is a number: the model's output cannot be used.
    pub(crate) fn next(&mut self, logits: &[f32]) -> Option<u32> {
        let token = if self.settings.temperature <= 0.0 { greedy(logits) } else { self.draw(logits) }?;
        if let Some(adjustments) = &mut self.adjustments {
            adjustments.note(token);
        }
        Some(token)
    }

    /// A token drawn by its probability, of those that no cut-off takes away.
    fn draw(&mut self, logits: &[f32]) -> Option<u32> {
        let mut candidates: Vec<(u32, f32)> = logits
            .iter()
            .enumerate()
            .filter(|(_, logit)| logit.is_finite())
            .map(|(token, &logit)| (token as u32, logit))
            .collect();
        let by_logit = |a: &(u32, f32), b: &(u32, f32)| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0));
        let top_k = self.settings.top_k;
        if top_k > 0 && top_k < candidates.len() {
            candidates.select_nth_unstable_by(top_k, by_logit);
            candidates.truncate(top_k);
        }
        // Sorted even without top-p, so that a seed's draw does not depend on how the selection left the order.
        candidates.sort_unstable_by(by_logit);
        let max = candidates.first()?.1;
        for (_, logit) in &mut candidates {
            // Divided only now: a logit divided by very little is infinite, and the difference of two of these no number.
            *logit = ((*logit - max) / self.settings.temperature).exp();
        }
        let mut total: f32 = candidates.iter().map(|c| c.1).sum();
        if self.settings.top_p > 0.0 && self.settings.top_p < 1.0 {
            candidates.truncate(nucleus(&candidates, self.settings.top_p * total));
            total = candidates.iter().map(|c| c.1).sum();
        }
        if self.settings.min_p > 0.0 {
            // The likeliest weighs 1.
            candidates.truncate(candidates.partition_point(|c| c.1 >= self.settings.min_p));
            total = candidates.iter().map(|c| c.1).sum();
        }
        let mut rest = self.draws.unit() * total;
        for &(token, weight) in &candidates {
            rest -= weight;
            if rest < 0.0 {
                return Some(token);
            }
        }
        candidates.last().map(|c| c.0)
    }
}

/// The first token with the largest logit (as torch's argmax on ties), NaN left out.
fn greedy(logits: &[f32]) -> Option<u32> {
    let most = max(logits);
    // A logit of -inf is never the answer: the token is ruled out.
    let token = logits.iter().position(|&logit| logit == most && logit > f32::NEG_INFINITY)?;
    Some(token as u32)
}

/// The largest value that is a number, or -inf. In lanes, so that a vocabulary takes a microsecond.
fn max(values: &[f32]) -> f32 {
    let mut lanes = [f32::NEG_INFINITY; 16];
    let (chunks, rest) = values.as_chunks::<16>();
    for chunk in chunks {
        for (most, &value) in lanes.iter_mut().zip(chunk) {
            *most = if value > *most { value } else { *most };
        }
    }
    lanes.iter().chain(rest).fold(f32::NEG_INFINITY, |most, &value| if value > most { value } else { most })
}

/// How many of `candidates` (most likely first) it takes to reach `mass`; at least one.
fn nucleus(candidates: &[(u32, f32)], mass: f32) -> usize {
    let mut reached = 0.0;
    for (count, &(_, weight)) in candidates.iter().enumerate() {
        reached += weight;
        if reached >= mass {
            return count + 1;
        }
    }
    candidates.len()
}

/// SplitMix64 (Steele, Lea, Flood 2014): the draws of a seed stay the same whatever version of whatever crate
/// is linked, which a library's default generator does not promise.
struct SplitMix64(u64);

impl SplitMix64 {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Uniform in [0, 1), from the 24 bits a f32 can hold.
    fn unit(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1 << 24) as f32
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    fn sampler(temperature: f32, top_k: usize, top_p: f32) -> Sampler {
        let settings = SamplerSettings { temperature, top_k, top_p, seed: Some(7), ..SamplerSettings::default() };
        Sampler::new(settings, &[])
    }

    #[test]
    fn greedy_takes_the_first_maximum() {
        // Would break: greedy decoding differs from the reference where two logits tie.
        let mut greedy = Sampler::new(SamplerSettings::default(), &[]);
        assert_eq!(greedy.next(&[0.0, 3.0, 3.0, f32::NAN]), Some(1));
        assert_eq!(greedy.next(&[0.0, f32::NEG_INFINITY, 3.0, 1.0]), Some(2));
        let long: Vec<f32> = (0..100).map(|i| if i % 33 == 0 { 9.0 } else { -(i as f32) }).collect();
        assert_eq!(greedy.next(&long), Some(0));
        assert_eq!(greedy.next(&long[1..]), Some(32));
        assert_eq!(greedy.next(&long[67..]), Some(32));
    }

    #[test]
    fn unusable_logits_are_no_token() {
        // Would break: a NaN from the model becomes token 0 of an answer.
        assert_eq!(Sampler::new(SamplerSettings::default(), &[]).next(&[f32::NAN; 4]), None);
        assert_eq!(sampler(1.0, 0, 0.0).next(&[f32::NAN; 4]), None);
        assert_eq!(Sampler::new(SamplerSettings::default(), &[]).next(&[f32::NEG_INFINITY]), None);
    }

    #[test]
    fn draws_follow_the_distribution() {
        // Would break: temperature sampling is biased.
        let logits = [0.5f32.ln(), 0.3f32.ln(), 0.2f32.ln()];
        let mut sampler = sampler(1.0, 0, 0.0);
        let mut counts = [0u32; 3];
        for _ in 0..20_000 {
            counts[sampler.next(&logits).expect("finite") as usize] += 1;
        }
        for (count, expected) in counts.iter().zip([10_000.0, 6_000.0, 4_000.0]) {
            assert!((f64::from(*count) - expected).abs() < 300.0, "{counts:?}");
        }
    }

    #[test]
    fn top_k_and_top_p_cut_the_tail() {
        // Would break: tokens outside the asked-for top k or nucleus are drawn.
        let logits = [0.1f32.ln(), 0.6f32.ln(), 0.25f32.ln(), 0.05f32.ln()];
        let (mut top_k, mut top_p) = (sampler(1.0, 2, 0.0), sampler(1.0, 0, 0.6));
        for _ in 0..500 {
            assert!([1, 2].contains(&top_k.next(&logits).expect("finite")));
            assert_eq!(top_p.next(&logits), Some(1));
        }
    }

    #[test]
    fn the_least_temperatures_take_the_likeliest() {
        // Would break: the colder the draw, the less likely its token, once logits divided by it are infinite.
        for temperature in [1e-30, 1e-38, f32::MIN_POSITIVE, 1e-44, f32::from_bits(1)] {
            for (top_k, top_p) in [(0, 0.0), (2, 0.0), (0, 0.9)] {
                let mut sampler = sampler(temperature, top_k, top_p);
                for logits in [[1.0, 30.0, -5.0], [-7.0, -6.0, -90.0], [0.0, 1.0, 0.0]] {
                    assert_eq!(sampler.next(&logits), Some(1), "{logits:?} at {temperature:e}");
                }
            }
        }
    }

    #[test]
    fn min_p_cuts_what_is_much_less_likely() {
        // Would break: a token is drawn that is less likely than asked for, or all are cut where the likeliest is unlikely.
        let logits = [0.1f32.ln(), 0.6f32.ln(), 0.25f32.ln(), 0.05f32.ln()];
        let drawn = |min_p, temperature, top_k| {
            let settings = SamplerSettings { temperature, top_k, min_p, seed: Some(5), ..SamplerSettings::default() };
            let mut sampler = Sampler::new(settings, &[]);
            (0..1000).map(|_| sampler.next(&logits).expect("finite")).collect::<BTreeSet<u32>>()
        };
        let tokens = |tokens: &[u32]| tokens.iter().copied().collect::<BTreeSet<u32>>();
        assert_eq!(drawn(0.0, 1.0, 0), tokens(&[0, 1, 2, 3]));
        // Of the likeliest they have 1/6, 1, 5/12 and 1/12.
        assert_eq!(drawn(0.1, 1.0, 0), tokens(&[0, 1, 2]));
        assert_eq!(drawn(0.2, 1.0, 0), tokens(&[1, 2]));
        assert_eq!(drawn(1.0, 1.0, 0), tokens(&[1]));
        // Behind the temperature: the square roots of these.
        assert_eq!(drawn(0.35, 2.0, 0), tokens(&[0, 1, 2]));
        assert_eq!(drawn(0.1, 1.0, 2), tokens(&[1, 2]));
    }

    #[test]
    fn greedy_answers_are_adjusted_too() {
        // Would break: a greedy answer repeats itself for ever although penalties were asked for.
        let settings = SamplerSettings { frequency_penalty: 1.0, ..SamplerSettings::default() };
        let mut sampler = Sampler::new(settings, &[]);
        assert!(!sampler.is_greedy(), "a device would choose without the penalties");
        let next = |sampler: &mut Sampler| {
            let mut logits = [0.0, 2.5, 1.0];
            sampler.adjust(&mut logits);
            sampler.next(&logits)
        };
        assert_eq!([(); 5].map(|()| next(&mut sampler)), [Some(1), Some(1), Some(2), Some(1), Some(0)]);
    }

    #[test]
    fn seed_repeats() {
        // Would break: two runs with the same seed give different answers.
        let logits: Vec<f32> = (0..50).map(|i| (i as f32 * 0.37).sin()).collect();
        let draw = || {
            let mut sampler = sampler(0.8, 20, 0.9);
            (0..50).map(|_| sampler.next(&logits).expect("finite")).collect::<Vec<_>>()
        };
        assert_eq!(draw(), draw());
    }
}
