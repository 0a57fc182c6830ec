//! Chooses the next token from logits: greedily, or drawn after temperature, top-k and top-p.

use rand::Rng as _;
use sida_model::generation::DefaultSampling;

/// How the next token is to be chosen, as a request asks for it. What it does not say is as the model's generation config
/// says, which for most models is greedy.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Sampling {
    /// 0: the most likely token, always. Otherwise divides the logits; at most 100.
    pub temperature: Option<f32>,
    /// Draw among so many most likely tokens; 0: among all.
    pub top_k: Option<usize>,
    /// Draw among the most likely tokens that together reach this probability; 0 or 1: among all.
    pub top_p: Option<f32>,
    /// Makes the draws repeat; drawn itself when missing.
    pub seed: Option<u64>,
}

/// The same, with what the model says. Checked.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct SamplerSettings {
    pub(crate) temperature: f32,
    pub(crate) top_k: usize,
    pub(crate) top_p: f32,
    pub(crate) seed: Option<u64>,
}

impl Sampling {
    /// What is asked for, by a model with these defaults.
    pub(crate) fn settings(&self, default: DefaultSampling) -> SamplerSettings {
        SamplerSettings {
            temperature: self.temperature.unwrap_or(default.temperature),
            top_k: self.top_k.unwrap_or(default.top_k),
            top_p: self.top_p.unwrap_or(default.top_p),
            seed: self.seed,
        }
    }
}

/// One sequence's sampler: its settings and the state of its draws.
/// Invariant: a draw depends on the seed, the draws before it and the logits only, never on the batch.
pub(crate) struct Sampler {
    settings: SamplerSettings,
    draws: SplitMix64,
}

impl Sampler {
    pub(crate) fn new(settings: SamplerSettings) -> Self {
        let draws = SplitMix64(settings.seed.unwrap_or_else(|| rand::rng().random()));
        Self { settings, draws }
    }

    /// Whether the sampler always takes the most likely token.
    pub(crate) fn is_greedy(&self) -> bool {
        self.settings.temperature <= 0.0
    }

    /// The next token, never one whose logit is -inf. `None` when no other is a number: the model's output cannot be used.
    pub(crate) fn next(&mut self, logits: &[f32]) -> Option<u32> {
        if self.is_greedy() {
            return greedy(logits);
        }
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
    use super::*;

    fn sampler(temperature: f32, top_k: usize, top_p: f32) -> Sampler {
        Sampler::new(SamplerSettings { temperature, top_k, top_p, seed: Some(7) })
    }

    #[test]
    fn greedy_takes_the_first_maximum() {
        // Would break: greedy decoding differs from the reference where two logits tie.
        let mut greedy = Sampler::new(SamplerSettings::default());
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
        assert_eq!(Sampler::new(SamplerSettings::default()).next(&[f32::NAN; 4]), None);
        assert_eq!(sampler(1.0, 0, 0.0).next(&[f32::NAN; 4]), None);
        assert_eq!(Sampler::new(SamplerSettings::default()).next(&[f32::NEG_INFINITY]), None);
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
    fn what_a_request_does_not_say_is_the_models() {
        // Would break: a model that is to be drawn from answers greedily, or overrules who asks.
        let model = DefaultSampling { temperature: 0.7, top_k: 50, top_p: 0.9 };
        let settings = |sampling: Sampling| sampling.settings(model);
        let all = settings(Sampling::default());
        assert_eq!(all, SamplerSettings { temperature: 0.7, top_k: 50, top_p: 0.9, seed: None });
        let greedy = settings(Sampling { temperature: Some(0.0), seed: Some(3), ..Sampling::default() });
        assert_eq!(greedy, SamplerSettings { temperature: 0.0, seed: Some(3), ..all.clone() });
        let wide = settings(Sampling { top_k: Some(0), top_p: Some(1.0), ..Sampling::default() });
        assert_eq!(wide, SamplerSettings { top_k: 0, top_p: 1.0, ..all });
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
