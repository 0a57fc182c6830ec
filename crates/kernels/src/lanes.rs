//! Sixteen float32 at a time: the one vector type all kernels are written in, as AVX-512, as AVX2 with FMA,
//! or as a plain array. All three do the same IEEE operations in the same order, so they agree to the bit.
//!
//! A kernel is a [`Kernel`]: generic over [`Lanes`], run by [`run`] with the widest the machine has. Everything
//! on its hot path must inline into `run`'s function, which alone is compiled for the features: loops, not
//! closures handed to library functions.

use std::sync::atomic::{AtomicU8, Ordering};

use super::{block_loads::BlockLoads, integer_loads::IntegerLoads, super_block_loads::SuperBlockLoads};

/// How many floats a vector holds, on every machine.
pub const LANES: usize = 16;
/// What memory is read by.
pub(super) const LINE_BYTES: usize = 64;

/// A vector of [`LANES`] floats.
///
/// # Safety
/// Implementations may need CPU features. Methods are called only inside a function compiled for them, which
/// [`run`] sees to; pointers must be valid for what is read or written.
#[allow(clippy::missing_safety_doc)]
pub unsafe trait Lanes: Copy + BlockLoads + IntegerLoads + SuperBlockLoads {
    /// Rows and columns of a matmul tile whose accumulators fit the registers.
    const TILE_ROWS: usize;
    /// All lanes `value`.
    unsafe fn splat(value: f32) -> Self;
    /// Reads 16 floats, any alignment.
    unsafe fn load(from: *const f32) -> Self;
    /// Reads `n < 16` floats; the other lanes are 0.
    unsafe fn load_partial(from: *const f32, n: usize) -> Self;
    /// Reads 16 bfloat16 values, any alignment.
    unsafe fn load_bf16(from: *const u16) -> Self;
    /// Writes 16 floats, any alignment.
    unsafe fn store(self, to: *mut f32);
    /// `a * b + self`, rounded once.
    unsafe fn fma(self, a: Self, b: Self) -> Self;
    /// `self + other`.
    unsafe fn add(self, other: Self) -> Self;
    /// Lane l of vector v becomes lane v of vector l.
    #[inline(always)]
    unsafe fn transpose(square: [Self; LANES]) -> [Self; LANES] {
        let mut floats = [[0.0; LANES]; LANES];
        let mut turned = [[0.0; LANES]; LANES];
        // SAFETY: each array holds 16 floats.
        unsafe {
            for v in 0..LANES {
                square[v].store(floats[v].as_mut_ptr());
            }
            for v in 0..LANES {
                for l in 0..LANES {
                    turned[l][v] = floats[v][l];
                }
            }
            std::array::from_fn(|v| Self::load(turned[v].as_ptr()))
        }
    }
    /// Asks for the cache line at an address, which need not be anybody's.
    #[inline(always)]
    unsafe fn prefetch_line(_at: *const u8) {}
    /// Asks for bytes that are needed soon.
    #[inline(always)]
    unsafe fn prefetch(soon: &[u8]) {
        let mut at = 0;
        while at < soon.len() {
            // SAFETY: the caller's machine.
            unsafe { Self::prefetch_line(soon.as_ptr().add(at)) };
            at += LINE_BYTES;
        }
    }
    /// The sum of all lanes: lane l with l + 8, then + 4, + 2, + 1.
    unsafe fn sum(self) -> f32;
    /// `sum` of several vectors.
    #[inline(always)]
    #[allow(clippy::needless_range_loop)] // Closures would not be compiled for the features of `run`.
    unsafe fn sums<const R: usize, const C: usize>(all: [[Self; C]; R]) -> [[f32; C]; R] {
        let mut sums = [[0.0; C]; R];
        for r in 0..R {
            for c in 0..C {
                // SAFETY: the caller's.
                sums[r][c] = unsafe { all[r][c].sum() };
            }
        }
        sums
    }
}

/// Work that is written once for every kind of [`Lanes`].
pub trait Kernel {
    /// What it returns.
    type Output;
    /// Does the work.
    ///
    /// # Safety
    /// The machine must have the features `L` needs.
    unsafe fn run<L: Lanes>(self) -> Self::Output;
}

/// A kind of vectors. All of them give the same bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Vectors {
    /// Arrays, on any machine.
    Portable = 1,
    /// AVX2 with FMA.
    Avx2,
    /// AVX-512F.
    Avx512,
}

/// What kernels run with, as a number; 0 until the first one does. Invariant: a kind that this machine has.
static CHOSEN: AtomicU8 = AtomicU8::new(0);

impl Vectors {
    /// Those of this machine, the widest last.
    pub fn of_this_machine() -> Vec<Self> {
        let mut kinds = vec![Self::Portable];
        #[cfg(target_arch = "x86_64")]
        if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
            kinds.push(Self::Avx2);
            if is_x86_feature_detected!("avx512f") {
                kinds.push(Self::Avx512);
            }
        }
        kinds
    }

    /// Lets all kernels of the process run with this kind from now on, instead of the widest: for tests of what machines
    /// without it compute. Panics unless this machine has it.
    pub fn choose(self) {
        assert!(Self::of_this_machine().contains(&self), "this machine has no {self:?}");
        CHOSEN.store(self as u8, Ordering::Relaxed);
    }

    #[inline]
    fn chosen() -> Self {
        let chosen = CHOSEN.load(Ordering::Relaxed);
        let is = |kind: &Self| *kind as u8 == chosen;
        match [Self::Avx512, Self::Avx2, Self::Portable].into_iter().find(is) {
            Some(kind) => kind,
            None => Self::choose_widest(),
        }
    }

    #[cold]
    fn choose_widest() -> Self {
        let widest = Self::of_this_machine().pop().unwrap_or(Self::Portable);
        widest.choose();
        widest
    }
}

/// Runs a kernel with the widest vectors this machine has.
#[inline]
pub fn run<K: Kernel>(kernel: K) -> K::Output {
    match Vectors::chosen() {
        // SAFETY: only a kind of this machine is ever chosen.
        #[cfg(target_arch = "x86_64")]
        Vectors::Avx512 => unsafe { x86::run_avx512(kernel) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Vectors::Avx2 => unsafe { x86::run_avx2(kernel) },
        // SAFETY: the portable lanes need no features.
        _ => unsafe { kernel.run::<Portable>() },
    }
}

/// The dot product of two slices of one length.
pub fn dot(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    run(Dot(a, b))
}

/// Two slices of one length.
struct Dot<'a>(&'a [f32], &'a [f32]);

impl Kernel for Dot<'_> {
    type Output = f32;

    #[inline(always)]
    unsafe fn run<L: Lanes>(self) -> f32 {
        // SAFETY: both slices hold `len` floats.
        unsafe { dot_lanes::<L>(self.0.as_ptr(), self.1.as_ptr(), self.0.len()) }
    }
}

/// The dot product of `len` floats, in the order every kernel uses.
///
/// # Safety
/// Both pointers must be valid for `len` floats, and the machine must have what `L` needs.
#[inline(always)]
pub unsafe fn dot_lanes<L: Lanes>(a: *const f32, b: *const f32, len: usize) -> f32 {
    // SAFETY: `at + 16 <= len`, and the tail reads the floats that are left.
    unsafe {
        let mut sum = L::splat(0.0);
        let whole = len / LANES * LANES;
        for at in (0..whole).step_by(LANES) {
            sum = sum.fma(L::load(a.add(at)), L::load(b.add(at)));
        }
        if whole < len {
            sum = sum.fma(L::load_partial(a.add(whole), len - whole), L::load_partial(b.add(whole), len - whole));
        }
        sum.sum()
    }
}

/// The reference the others must agree with: an array.
#[derive(Clone, Copy)]
pub struct Portable(pub(super) [f32; LANES]);

// SAFETY: needs no CPU features.
unsafe impl Lanes for Portable {
    const TILE_ROWS: usize = 1;

    #[inline(always)]
    unsafe fn splat(value: f32) -> Self {
        Self([value; LANES])
    }

    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        // SAFETY: the caller's pointer is valid for 16 floats.
        Self(unsafe { from.cast::<[f32; LANES]>().read_unaligned() })
    }

    #[inline(always)]
    unsafe fn load_partial(from: *const f32, n: usize) -> Self {
        // SAFETY: the caller's pointer is valid for `n` floats.
        Self(std::array::from_fn(|lane| if lane < n { unsafe { from.add(lane).read_unaligned() } } else { 0.0 }))
    }

    #[inline(always)]
    unsafe fn load_bf16(from: *const u16) -> Self {
        // SAFETY: the caller's pointer is valid for 16 values.
        let narrow = unsafe { from.cast::<[u16; LANES]>().read_unaligned() };
        Self(narrow.map(|bits| f32::from_bits(u32::from(bits) << 16)))
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        // SAFETY: the caller's pointer is valid for 16 floats.
        unsafe { to.cast::<[f32; LANES]>().write_unaligned(self.0) }
    }

    #[inline(always)]
    unsafe fn fma(self, a: Self, b: Self) -> Self {
        Self(std::array::from_fn(|lane| a.0[lane].mul_add(b.0[lane], self.0[lane])))
    }

    #[inline(always)]
    unsafe fn add(self, other: Self) -> Self {
        Self(std::array::from_fn(|lane| self.0[lane] + other.0[lane]))
    }

    #[inline(always)]
    unsafe fn sum(self) -> f32 {
        let mut lanes = self.0;
        let mut width = LANES / 2;
        while width > 0 {
            for lane in 0..width {
                lanes[lane] += lanes[lane + width];
            }
            width /= 2;
        }
        lanes[0]
    }
}

#[cfg(target_arch = "x86_64")]
pub(super) use x86::{Avx2, Avx512};

#[cfg(target_arch = "x86_64")]
mod x86;
