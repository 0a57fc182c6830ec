//! Rotary positions (RoPE): how far each pair of a head's values is turned at each position. Frequencies are float32, as
//! those of transformers, whose modeling_rope_utils.py is their source. Powers and cosines are taken in float64 and rounded,
//! so that they hardly depend on the C library.

use std::{f64::consts::PI, ops::Range};

use crate::spec::{Rotary, RotaryScaling};

/// Cosines and sines of some positions.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Turns {
    /// (positions, head_dim / 2)
    turns: Vec<(f32, f32)>,
    head_dim: usize,
}

impl Turns {
    /// Of these positions, in this order, for heads of so many values.
    pub(crate) fn of(rotary: &Rotary, head_dim: usize, positions: impl Iterator<Item = usize>) -> Self {
        let (frequencies, factor) = (frequencies(rotary, head_dim), factor(rotary));
        let turn = |position: usize, frequency: f32| {
            let angle = f64::from(position as f32 * frequency);
            (angle.cos() as f32 * factor, angle.sin() as f32 * factor)
        };
        let turns = positions.flat_map(|position| frequencies.iter().map(move |&frequency| turn(position, frequency)));
        Self { turns: turns.collect(), head_dim }
    }

    /// Turns heads of a row, the `row`-th of the positions, one after another.
    pub(crate) fn turn(&self, row: usize, heads: &mut [f32]) {
        let half = self.head_dim / 2;
        let turns = &self.turns[row * half..][..half];
        for head in heads.chunks_exact_mut(self.head_dim) {
            let (first, second) = head.split_at_mut(half);
            for ((a, b), (cos, sin)) in first.iter_mut().zip(second).zip(turns) {
                (*a, *b) = (*a * cos - *b * sin, *b * cos + *a * sin);
            }
        }
    }
}

/// What cosines and sines are multiplied by.
pub(crate) fn factor(rotary: &Rotary) -> f32 {
    match rotary.scaling {
        RotaryScaling::Yarn { attention_factor, .. } => attention_factor as f32,
        _ => 1.0,
    }
}

/// How far a pair is turned from one position to the next, pair by pair.
pub(crate) fn frequencies(rotary: &Rotary, dims: usize) -> Vec<f32> {
    let Rotary { theta, scaling } = *rotary;
    let half = dims / 2;
    let plain = |pair: usize| 1.0 / theta.powf((2 * pair) as f64 / dims as f64);
    let scaled = |pair: usize| match scaling {
        RotaryScaling::None => plain(pair),
        RotaryScaling::Linear { factor } => plain(pair) / factor,
        RotaryScaling::Yarn { factor, beta_fast, beta_slow, trained, truncate, .. } => {
            let Range { start, end } = ramp(dims, theta, trained, (beta_fast, beta_slow), truncate);
            let is_low = ((pair as f64 - start) / (end - start)).clamp(0.0, 1.0);
            plain(pair) / factor * is_low + plain(pair) * (1.0 - is_low)
        }
        RotaryScaling::Llama3 { factor, low_freq_factor, high_freq_factor, trained } => {
            let wavelength = 2.0 * PI / plain(pair);
            if wavelength < trained / high_freq_factor {
                plain(pair)
            } else if wavelength > trained / low_freq_factor {
                plain(pair) / factor
            } else {
                let smooth = (trained / wavelength - low_freq_factor) / (high_freq_factor - low_freq_factor);
                (1.0 - smooth) * plain(pair) / factor + smooth * plain(pair)
            }
        }
    };
    (0..half).map(|pair| scaled(pair) as f32).collect()
}

/// Between which pairs yarn goes from high frequencies to low ones.
fn ramp(dims: usize, theta: f64, trained: f64, betas: (f64, f64), truncate: bool) -> Range<f64> {
    let pair = |turns: f64| dims as f64 * (trained / (turns * 2.0 * PI)).ln() / (2.0 * theta.ln());
    let (mut low, mut high) = (pair(betas.0), pair(betas.1));
    if truncate {
        (low, high) = (low.floor(), high.ceil());
    }
    let (low, high) = (low.max(0.0), high.min(dims as f64 - 1.0));
    low..if low == high { high + 0.001 } else { high }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rotary(scaling: RotaryScaling) -> Rotary {
        Rotary { theta: 10_000.0, scaling }
    }

    /// Queries and keys would meet at other distances than they were trained for.
    #[test]
    fn pairs_are_turned_by_their_position() {
        let turns = Turns::of(&rotary(RotaryScaling::None), 8, [0, 3].into_iter());
        let mut heads: Vec<f32> = (1..=16).map(|value| value as f32).collect();
        let before = heads.clone();
        turns.turn(0, &mut heads);
        assert_eq!(heads, before, "position 0 turns nothing");
        turns.turn(1, &mut heads);
        for pair in [0, 1, 2, 3, 8, 9, 10, 11] {
            let angle = 3.0 * 10_000_f64.powf(-((pair % 8) as f64) / 4.0);
            let (a, b) = (f64::from(before[pair]), f64::from(before[pair + 4]));
            let expected = (a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin());
            assert!(
                (f64::from(heads[pair]) - expected.0).abs() < 1e-5
                    && (f64::from(heads[pair + 4]) - expected.1).abs() < 1e-5
            );
        }
    }

    /// A model for long texts would be another one.
    #[test]
    fn scalings_change_low_frequencies() {
        let plain = frequencies(&rotary(RotaryScaling::None), 8);
        let linear = frequencies(&rotary(RotaryScaling::Linear { factor: 4.0 }), 8);
        assert!(plain.iter().zip(&linear).all(|(plain, linear)| (plain / 4.0 - linear).abs() < 1e-9));
        let llama3 =
            RotaryScaling::Llama3 { factor: 8.0, low_freq_factor: 1.0, high_freq_factor: 4.0, trained: 8192.0 };
        let llama3 = frequencies(&rotary(llama3), 8);
        assert_eq!(llama3[0], plain[0]);
        assert!(llama3[3] < plain[3]);
        let yarn = RotaryScaling::Yarn {
            factor: 4.0,
            beta_fast: 32.0,
            beta_slow: 1.0,
            trained: 4096.0,
            attention_factor: 1.0,
            truncate: true,
        };
        let yarn = frequencies(&rotary(yarn), 8);
        assert!(yarn[0] == plain[0] && yarn[3] < plain[3] && yarn[3] >= plain[3] / 4.0);
    }
}
