//! Recorded routes through the residency machine: how often an expert is there when its layer begins, and how much is moved for
//! it, with plans that guess so much of what comes and without any. Beside it the two rules that everybody knows: what was not
//! used for longest leaves, and what is not used for longest from now on leaves (Belady's rule, which nobody can follow).
//!
//! One sequence is decoded, token by token and layer by layer; the tokens of the prompt go first, the same way, and are not
//! counted. Memory has one pool of slots for the experts of all layers. While a layer computes, a few loads are done ahead of
//! what is planned; what a layer misses is loaded when it begins.
//!
//! Called by `sida eval --routes`, and by the test that holds the machine to what it should gain.

use std::{
    collections::{BTreeSet, HashMap, VecDeque},
    ops::AddAssign,
};

use crate::{
    ExpertId, ExpertKey, LayerId, Plan, PlanId, RecordedRoutes, TokenRoutes,
    recorded_routes::Phase,
    residency::{Access, Residency, ResidencyConfig},
};

/// What is planned, and when.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lookahead {
    /// Nothing.
    None,
    /// When a layer begins, the next one of the token: by the next layer's router on this layer's input.
    Layer,
    /// When a token begins, all of its layers: by a hash table.
    Step,
}

/// How a recording is replayed.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ReplayConfig {
    /// Experts of a layer.
    pub num_experts: usize,
    /// Places for one expert each, of whatever layer.
    pub slots: usize,
    /// What is planned, and when.
    pub lookahead: Lookahead,
    /// Loads ahead that are done while a layer computes, at most.
    pub loads_ahead_max: usize,
}

/// What came of it, of the tokens that were generated.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Replayed {
    /// Tokens.
    pub tokens: u64,
    /// Experts that their layers used.
    pub uses: u64,
    /// Those that were resident when their layer began, however they came there.
    pub hits: u64,
    /// Experts that were loaded when their layer began.
    pub demand_loads: u64,
    /// Experts that were loaded ahead.
    pub loads_ahead: u64,
}

impl Replayed {
    /// The share of uses that found their expert resident when the layer began.
    pub fn hit_share(&self) -> f64 {
        self.hits as f64 / self.uses.max(1) as f64
    }

    /// Loads of whatever kind: what is moved.
    pub fn loads(&self) -> u64 {
        self.demand_loads + self.loads_ahead
    }

    /// Loads of whatever kind, of a token.
    pub fn loads_per_token(&self) -> f64 {
        self.loads() as f64 / self.tokens.max(1) as f64
    }
}

impl AddAssign for Replayed {
    fn add_assign(&mut self, other: Self) {
        self.tokens += other.tokens;
        self.uses += other.uses;
        self.hits += other.hits;
        self.demand_loads += other.demand_loads;
        self.loads_ahead += other.loads_ahead;
    }
}

/// The tokens of a recording in order, and whether each counts.
fn tokens(routes: &RecordedRoutes) -> impl Iterator<Item = (Phase, usize)> {
    let of = |phase| (0..routes.tokens(phase)).map(move |token| (phase, token));
    of(Phase::Prompt).chain(of(Phase::Decoding))
}

fn layers(routes: &RecordedRoutes) -> impl Iterator<Item = LayerId> + use<> {
    (0..routes.layers() as u16).map(LayerId)
}

/// Through the residency machine. `guesses` has the shape of `routes` and is what plans name.
pub fn replay(routes: &RecordedRoutes, guesses: &RecordedRoutes, config: ReplayConfig) -> Replayed {
    let ReplayConfig { num_experts, slots, lookahead, .. } = config;
    let residency = ResidencyConfig { slots, layers: routes.layers(), num_experts, plans_max: 8 };
    let mut replay = Replay { residency: Residency::new(residency), config, plans: 0 };
    let mut replayed = Replayed { tokens: routes.tokens(Phase::Decoding) as u64, ..Replayed::default() };
    for (phase, token) in tokens(routes) {
        if lookahead == Lookahead::Step {
            let planned = layers(routes).flat_map(|layer| keys(layer, guesses.experts(phase, token, layer)));
            replay.plan(planned.collect());
        }
        for layer in layers(routes) {
            let next = LayerId(layer.0 + 1);
            if lookahead == Lookahead::Layer && usize::from(next.0) < routes.layers() {
                replay.plan(keys(next, guesses.experts(phase, token, next)).collect());
            }
            let of_layer = replay.layer(layer, routes.experts(phase, token, layer));
            if phase == Phase::Decoding {
                replayed += of_layer;
            }
        }
    }
    replayed
}

fn keys(layer: LayerId, experts: &[ExpertId]) -> impl Iterator<Item = ExpertKey> {
    experts.iter().map(move |&expert| ExpertKey { layer, expert })
}

/// The machine, as an expert-node drives it.
struct Replay {
    residency: Residency,
    config: ReplayConfig,
    plans: u64,
}

impl Replay {
    fn plan(&mut self, experts: Vec<ExpertKey>) {
        self.plans += 1;
        let plan = Plan { id: PlanId(self.plans), experts, begins: true };
        self.residency.plan(&plan).expect("a recording names experts of the model, each once");
    }

    /// A layer: its call, what that misses, and the loads ahead that are done meanwhile.
    fn layer(&mut self, layer: LayerId, experts: &[ExpertId]) -> Replayed {
        let residency = &mut self.residency;
        let mut pending = residency.call(layer, experts.iter().copied()).expect("experts of the model, each once");
        residency.advance(layer);
        let mut replayed = Replayed { uses: experts.len() as u64, ..Replayed::default() };
        while !pending.is_empty() {
            let mut grants = Vec::new();
            residency.acquire(&mut pending, usize::MAX, &mut grants);
            for grant in grants {
                match grant.access {
                    Access::Resident | Access::Await(_) => replayed.hits += 1,
                    Access::Load { .. } => {
                        replayed.demand_loads += 1;
                        residency.loaded(grant.slot);
                    }
                }
                residency.unpin(grant.slot);
            }
        }
        for _ in 0..self.config.loads_ahead_max {
            let Some(load) = residency.next_prefetch() else { break };
            residency.loaded(load.slot);
            replayed.loads_ahead += 1;
        }
        replayed
    }
}

/// With so many slots from which leaves what was not used for longest.
pub fn least_recently_used(routes: &RecordedRoutes, slots: usize) -> Replayed {
    by_rank(routes, slots, |now, _| usize::MAX - now)
}

/// With so many slots from which leaves what is not used for longest from then on: the fewest loads that are possible.
pub fn belady(routes: &RecordedRoutes, slots: usize) -> Replayed {
    by_rank(routes, slots, |_, next| next)
}

/// A cache from which the highest rank leaves, as given at the last use of each: by the position of that, and of the next.
fn by_rank(routes: &RecordedRoutes, slots: usize, rank: impl Fn(usize, usize) -> usize) -> Replayed {
    let mut uses: HashMap<ExpertKey, VecDeque<usize>> = HashMap::new();
    let all = tokens(routes).flat_map(|(phase, token)| {
        layers(routes)
            .flat_map(move |layer| keys(layer, routes.experts(phase, token, layer)).map(move |key| (phase, key)))
    });
    let all: Vec<_> = all.collect();
    for (at, &(_, key)) in all.iter().enumerate() {
        uses.entry(key).or_default().push_back(at);
    }
    let (mut resident, mut ranks) = (BTreeSet::new(), HashMap::new());
    let mut replayed = Replayed { tokens: routes.tokens(Phase::Decoding) as u64, ..Replayed::default() };
    for (at, (phase, key)) in all.into_iter().enumerate() {
        let ahead = uses.get_mut(&key).expect("every use was noted");
        ahead.pop_front();
        let rank = rank(at, ahead.front().copied().unwrap_or(usize::MAX));
        let before = ranks.insert(key, rank);
        let is_hit = before.is_some_and(|before| resident.remove(&(before, key)));
        if !is_hit && resident.len() >= slots {
            resident.pop_last();
        }
        resident.insert((rank, key));
        if phase == Phase::Decoding {
            replayed.uses += 1;
            replayed.hits += u64::from(is_hit);
            replayed.demand_loads += u64::from(!is_hit);
        }
    }
    replayed
}

/// What a predictor names that is right with so large a share of the experts: each that is not is another one of the layer, by
/// chance. `random` gives numbers from 0 up to 1.
pub fn guesses(
    routes: &RecordedRoutes,
    num_experts: usize,
    right_share: f64,
    mut random: impl FnMut() -> f64,
) -> RecordedRoutes {
    let mut of_layer = |right: &[ExpertId]| {
        let mut guessed = Vec::with_capacity(right.len());
        for &expert in right {
            let is_right = random() < right_share || right.len() > num_experts / 2;
            guessed.push(if is_right { expert } else { wrong(right, &guessed, num_experts, &mut random) });
        }
        guessed
    };
    let mut guess = |phase| -> Vec<TokenRoutes> {
        let token = |token| layers(routes).map(|layer| of_layer(routes.experts(phase, token, layer))).collect();
        (0..routes.tokens(phase)).map(token).collect()
    };
    RecordedRoutes::new(guess(Phase::Prompt), guess(Phase::Decoding)).expect("of the same shape")
}

/// An expert that neither was chosen nor is guessed already.
fn wrong(right: &[ExpertId], guessed: &[ExpertId], num_experts: usize, random: &mut impl FnMut() -> f64) -> ExpertId {
    loop {
        let expert = ExpertId((random() * num_experts as f64) as u16);
        if !right.contains(&expert) && !guessed.contains(&expert) {
            return expert;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LAYERS: usize = 6;
    const EXPERTS: usize = 64;
    const TOP_K: usize = 4;
    /// Room for a fifth of the experts.
    const SLOTS: usize = LAYERS * EXPERTS / 5;
    /// The share of a layer's experts that is guessed by the next layer's router on this layer's input, as published.
    const RIGHT_SHARE: f64 = 0.886;

    /// Numbers from 0 up to 1 (splitmix64).
    fn random(mut seed: u64) -> impl FnMut() -> f64 {
        move || {
            seed = seed.wrapping_add(0x9E37_79B9_7F4A_7C15);
            let mut z = seed;
            z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
            z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
            ((z ^ (z >> 31)) >> 11) as f64 / (1_u64 << 53) as f64
        }
    }

    /// Tokens of which each keeps some of the experts of the one before it, and takes the others as likely as a few of them are
    /// hot: about as real decoder-only models do.
    fn recorded(prompt: usize, decoding: usize, seed: u64) -> RecordedRoutes {
        let mut random = random(seed);
        let mut last: TokenRoutes = vec![Vec::new(); LAYERS];
        let mut token = || {
            for experts in &mut last {
                experts.retain(|_| random() < 0.35);
                while experts.len() < TOP_K {
                    let expert = ExpertId((random().powi(4) * EXPERTS as f64) as u16);
                    if !experts.contains(&expert) {
                        experts.push(expert);
                    }
                }
            }
            last.clone()
        };
        let prompt = (0..prompt).map(|_| token()).collect();
        RecordedRoutes::new(prompt, (0..decoding).map(|_| token()).collect()).expect("tokens")
    }

    fn with(lookahead: Lookahead, loads_ahead_max: usize) -> ReplayConfig {
        ReplayConfig { num_experts: EXPERTS, slots: SLOTS, lookahead, loads_ahead_max }
    }

    #[test]
    fn plans_have_experts_there_in_time() {
        // Would break: plans that guess as well as published predictors do hardly help, be it that what they name is not loaded,
        // that it leaves again before its layer, or that what leaves for it is used sooner.
        for seed in 0..4 {
            let routes = recorded(32, 128, seed);
            let guessed = guesses(&routes, EXPERTS, RIGHT_SHARE, random(seed + 100));
            let (lru, best) = (least_recently_used(&routes, SLOTS), belady(&routes, SLOTS));
            let of = |config| replay(&routes, &guessed, config);
            let unplanned = of(with(Lookahead::None, 1));
            let [layer, step] = [Lookahead::Layer, Lookahead::Step].map(|lookahead| of(with(lookahead, 1)));
            let told = format!("seed {seed}: lru {lru:?}, no plans {unplanned:?}, {layer:?}, {step:?}, best {best:?}");
            assert!(lru.hit_share() <= best.hit_share(), "{told}");
            for planned in [layer, step] {
                assert!(planned.hit_share() >= lru.hit_share() + 0.06, "{told}");
                assert!(planned.hit_share() >= unplanned.hit_share() + 0.05, "{told}");
                // What is guessed wrong is moved for nothing, and no more than that.
                assert!(planned.loads_per_token() <= unplanned.loads_per_token() * 1.2, "{told}");
            }
        }
    }

    #[test]
    fn nothing_moves_less_than_the_best_rule() {
        // Would break: a replay counts less than what is moved, or hits that are none, so that plans look better than they are.
        let routes = recorded(32, 128, 7);
        let best = belady(&routes, SLOTS);
        assert_eq!((best.tokens, best.uses), (128, (128 * LAYERS * TOP_K) as u64));
        for lookahead in [Lookahead::None, Lookahead::Layer, Lookahead::Step] {
            for loads_ahead_max in [0, 1, usize::MAX] {
                let found = replay(&routes, &routes, with(lookahead, loads_ahead_max));
                assert!(found.loads() >= best.loads(), "{lookahead:?} {loads_ahead_max}: {found:?}, best {best:?}");
                assert_eq!((found.uses, found.hits + found.demand_loads), (best.uses, best.uses), "{found:?}");
                assert!(loads_ahead_max > 0 || found.loads_ahead == 0, "{found:?}");
            }
        }
        // Plans that are right and load nothing ahead only say who leaves, of which nobody knows more than the best rule.
        let planned = replay(&routes, &routes, with(Lookahead::Step, 0));
        assert!(planned.hit_share() <= best.hit_share(), "{planned:?} {best:?}");
        // With all the time that it takes, what is planned rightly is there: all but the first layer of a token.
        let ahead = replay(&routes, &routes, with(Lookahead::Step, usize::MAX));
        assert!(ahead.demand_loads <= ahead.tokens * TOP_K as u64, "{ahead:?}");
    }

    #[test]
    fn guesses_are_as_right_as_they_should_be() {
        // Would break: a predictor is measured that is better or worse than it is said to be, or names an expert twice.
        let routes = recorded(0, 400, 3);
        let guessed = guesses(&routes, EXPERTS, RIGHT_SHARE, random(5));
        let (mut right, mut all) = (0, 0);
        for token in 0..400 {
            for layer in layers(&routes) {
                let [found, true_ones] = [&guessed, &routes].map(|of| of.experts(Phase::Decoding, token, layer));
                assert_eq!(found.iter().collect::<BTreeSet<_>>().len(), TOP_K, "{found:?}");
                right += found.iter().filter(|expert| true_ones.contains(expert)).count();
                all += TOP_K;
            }
        }
        let share = right as f64 / all as f64;
        assert!((share - RIGHT_SHARE).abs() < 0.02, "{share}");
        assert_eq!(guesses(&routes, EXPERTS, 1.0, random(5)), routes);
    }

    #[test]
    fn rules_are_those_of_the_book() {
        // Would break: plans are compared with rules that are not what their names say.
        let token = |expert: u16| vec![vec![ExpertId(expert)]];
        let routes = RecordedRoutes::new(Vec::new(), [0, 1, 2, 0, 1, 3, 0, 1].map(token).to_vec()).expect("tokens");
        // Two slots, eight uses: the longest unused always leaves for what is wanted next but one.
        assert_eq!(least_recently_used(&routes, 2).hits, 0);
        // 1 leaves for 2, and again for 3, so that 0 is there both times.
        assert_eq!(belady(&routes, 2).hits, 2);
        assert_eq!(least_recently_used(&routes, 4).demand_loads, 4);
    }
}
