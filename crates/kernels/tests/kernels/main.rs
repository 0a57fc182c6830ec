//! The kernels by what they are called by. Not beside them: a crate's unit tests are compiled with all of it once more, and this
//! one takes long.

mod attention;
mod elementwise;
mod exp;
mod float8;
mod lanes;
mod matmul;
mod norm;
mod position_bias;
mod super_blocks;

use std::sync::Mutex;

use sida_kernels::lanes::Vectors;

/// What a computation gives with each kind of vectors that this machine has. Other tests may run meanwhile: they take what
/// is chosen, and find the same bits.
fn each_kind<T>(compute: impl Fn() -> T) -> Vec<T> {
    static CHOOSING: Mutex<()> = Mutex::new(());
    let _others_wait = CHOOSING.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    let with = |kind: Vectors| {
        kind.choose();
        compute()
    };
    Vectors::of_this_machine().into_iter().map(with).collect()
}
