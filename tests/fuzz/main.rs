//! Fuzz targets: one per decoder of bytes that come from outside. Each damages valid seeds and asserts that what
//! comes back is a value or a typed error: no panic, no endless work, no allocation by a claimed length.
//!
//! `cargo test` runs each for a moment (`SIDA_FUZZ_SECONDS`, 2 by default) and prints the seed of a failure, which
//! `BOLERO_RANDOM_SEED` replays. For a real hunt: `cargo bolero test -p sida-tests --test fuzz TARGET`, which keeps its
//! corpus and its crashes under `fuzz/__fuzz__`.
//!
//! In reading order: [`allocation`] and [`damage`] (what the targets share), [`wire`], [`model_files`],
//! [`checkpoint`], [`pickle`], [`gguf`], [`predictor`], [`cluster_file`], [`requests`].

mod allocation;
mod checkpoint;
mod cluster_file;
mod damage;
mod gguf;
mod model_files;
mod pickle;
mod predictor;
mod requests;
mod wire;

use std::time::Duration;

/// Decoding may allocate this much at once whatever the input: read buffers, empty tables.
const ALLOCATION_BYTES_FREE: usize = 4 << 20;
/// And so many times the input's length.
const ALLOCATION_BYTES_PER_BYTE: usize = 64;

/// `fuzz!(seeds, decode)` calls `decode` with each seed, then with damaged copies of them. `decode` tells whether it took
/// the bytes; a target whose seeds are refused would test nothing but the first check, and fails.
macro_rules! fuzz {
    ($seeds:expr, $decode:expr) => {
        let seeds: Vec<Vec<u8>> = $seeds.into_iter().collect();
        crate::check_seeds(&seeds, $decode);
        // Where this stands names the target: to bolero's command line, and for its folder under `__fuzz__`.
        bolero::check!()
            .with_type::<crate::damage::Damage>()
            .with_test_time(crate::test_time())
            .with_iterations(usize::MAX)
            .for_each(|damage| crate::check_damaged(&damage.of(&seeds), $decode));
    };
}
pub(crate) use fuzz;

fn check_seeds(seeds: &[Vec<u8>], decode: impl Fn(&[u8]) -> bool) {
    for (index, seed) in seeds.iter().enumerate() {
        assert!(decode(seed), "seed {index} is refused");
    }
}

fn check_damaged(bytes: &[u8], decode: impl Fn(&[u8]) -> bool) {
    let (_, largest) = allocation::largest_during(|| decode(bytes));
    let allowed = ALLOCATION_BYTES_FREE + ALLOCATION_BYTES_PER_BYTE * bytes.len();
    assert!(largest <= allowed, "{largest} bytes allocated at once for an input of {}", bytes.len());
}

fn test_time() -> Duration {
    let seconds = std::env::var("SIDA_FUZZ_SECONDS").ok().and_then(|text| text.parse().ok()).unwrap_or(2.0);
    Duration::from_secs_f64(seconds)
}
