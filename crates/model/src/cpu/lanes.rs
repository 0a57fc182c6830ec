//! Sixteen float32 at a time: the one vector type all kernels are written in, as AVX-512, as AVX2 with FMA,
//! or as a plain array. All three do the same IEEE operations in the same order, so they agree to the bit.
//!
//! A kernel is a [`Kernel`]: generic over [`Lanes`], run by [`run`] with the widest the machine has. Everything
//! on its hot path must inline into `run`'s function, which alone is compiled for the features: loops, not
//! closures handed to library functions.

use super::block_loads::BlockLoads;

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
pub unsafe trait Lanes: Copy + BlockLoads {
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

/// Runs a kernel with the widest vectors this machine has.
#[inline]
pub fn run<K: Kernel>(kernel: K) -> K::Output {
    #[cfg(target_arch = "x86_64")]
    {
        if is_x86_feature_detected!("avx512f") {
            // SAFETY: AVX-512F was just detected.
            return unsafe { x86::run_avx512(kernel) };
        }
        if has_avx2() {
            // SAFETY: just detected.
            return unsafe { x86::run_avx2(kernel) };
        }
    }
    // SAFETY: the portable lanes need no features.
    unsafe { kernel.run::<Portable>() }
}

/// AVX2 and what comes with it.
#[cfg(target_arch = "x86_64")]
fn has_avx2() -> bool {
    is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma")
}

/// Runs a kernel once with each kind of vectors that this machine has.
#[cfg(test)]
pub(super) fn run_each<K: Kernel>(kernel: impl Fn() -> K) -> Vec<K::Output> {
    // SAFETY: the portable lanes need no features.
    let mut outputs = vec![unsafe { kernel().run::<Portable>() }];
    #[cfg(target_arch = "x86_64")]
    if has_avx2() {
        // SAFETY: just detected.
        outputs.push(unsafe { x86::run_avx2(kernel()) });
    }
    outputs.push(run(kernel()));
    outputs
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
mod x86 {
    //! SAFETY of this module: methods run inside `run_avx512` or `run_avx2`, after detection; pointers are
    //! the caller's promise.
    #![allow(clippy::undocumented_unsafe_blocks)]

    use std::arch::x86_64::*;

    use super::{Kernel, LANES, Lanes};

    #[target_feature(enable = "avx512f,avx2,fma")]
    pub(super) unsafe fn run_avx512<K: Kernel>(kernel: K) -> K::Output {
        unsafe { kernel.run::<Avx512>() }
    }

    #[target_feature(enable = "avx2,fma")]
    pub(super) unsafe fn run_avx2<K: Kernel>(kernel: K) -> K::Output {
        unsafe { kernel.run::<Avx2>() }
    }

    #[derive(Clone, Copy)]
    pub(crate) struct Avx512(pub(crate) __m512);

    unsafe impl Lanes for Avx512 {
        const TILE_ROWS: usize = 4;

        #[inline(always)]
        unsafe fn splat(value: f32) -> Self {
            unsafe { Self(_mm512_set1_ps(value)) }
        }

        #[inline(always)]
        unsafe fn load(from: *const f32) -> Self {
            unsafe { Self(_mm512_loadu_ps(from)) }
        }

        #[inline(always)]
        unsafe fn load_partial(from: *const f32, n: usize) -> Self {
            unsafe { Self(_mm512_maskz_loadu_ps((1u16 << n) - 1, from)) }
        }

        #[inline(always)]
        unsafe fn load_bf16(from: *const u16) -> Self {
            unsafe {
                let wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(from.cast()));
                Self(_mm512_castsi512_ps(_mm512_slli_epi32::<16>(wide)))
            }
        }

        #[inline(always)]
        unsafe fn store(self, to: *mut f32) {
            unsafe { _mm512_storeu_ps(to, self.0) }
        }

        #[inline(always)]
        unsafe fn fma(self, a: Self, b: Self) -> Self {
            unsafe { Self(_mm512_fmadd_ps(a.0, b.0, self.0)) }
        }

        #[inline(always)]
        unsafe fn add(self, other: Self) -> Self {
            unsafe { Self(_mm512_add_ps(self.0, other.0)) }
        }

        /// Swaps the blocks beside the diagonal, of size 8, then 4, 2, 1.
        #[inline(always)]
        unsafe fn transpose(mut square: [Self; LANES]) -> [Self; LANES] {
            unsafe {
                let lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
                let mut size = LANES / 2;
                while size > 0 {
                    // Of two vectors, 0..16 and 16..32: the first's low blocks and the second's; and the high ones.
                    let step = _mm512_set1_epi32(size as i32);
                    let in_high = _mm512_test_epi32_mask(lane, step);
                    let other = _mm512_set1_epi32(LANES as i32 - size as i32);
                    let low = _mm512_mask_add_epi32(lane, in_high, lane, other);
                    let high = _mm512_mask_add_epi32(
                        _mm512_add_epi32(lane, step),
                        in_high,
                        lane,
                        _mm512_set1_epi32(LANES as i32),
                    );
                    let mut v = 0;
                    while v < LANES {
                        if v & size == 0 {
                            let (a, b) = (square[v].0, square[v + size].0);
                            square[v] = Self(_mm512_permutex2var_ps(a, low, b));
                            square[v + size] = Self(_mm512_permutex2var_ps(a, high, b));
                        }
                        v += 1;
                    }
                    size /= 2;
                }
                square
            }
        }

        #[inline(always)]
        unsafe fn prefetch_line(at: *const u8) {
            unsafe { _mm_prefetch::<_MM_HINT_T0>(at.cast()) };
        }

        #[inline(always)]
        unsafe fn sum(self) -> f32 {
            unsafe { sum_256(halves(self.0)) }
        }

        #[inline(always)]
        unsafe fn sums<const R: usize, const C: usize>(all: [[Self; C]; R]) -> [[f32; C]; R] {
            let mut sums = [[0.0; C]; R];
            let (all, to) = (all.as_ptr().cast::<Self>(), sums.as_mut_ptr().cast::<f32>());
            let mut n = 0;
            unsafe {
                while n + LANES <= R * C {
                    sums_16(all.add(n)).store(to.add(n));
                    n += LANES;
                }
                while n + 4 <= R * C {
                    let four = |i| halves((*all.add(n + i)).0);
                    to.add(n).cast::<[f32; 4]>().write_unaligned(sums_4(four(0), four(1), four(2), four(3)));
                    n += 4;
                }
                while n < R * C {
                    *to.add(n) = (*all.add(n)).sum();
                    n += 1;
                }
            }
            sums
        }
    }

    /// Sixteen sums at once, each the tree of `sum`: one addition serves two vectors, then four, eight and sixteen.
    /// One after another they would take as long as dot products of 128 inputs.
    #[inline(always)]
    unsafe fn sums_16(all: *const Avx512) -> Avx512 {
        unsafe {
            // In the order in which sum l ends in lane l.
            let at = |n: usize| (*all.add(n % 4 * 4 + n / 4)).0;
            let by_8 = |n| {
                let (a, b) = (at(n), at(n + 1));
                _mm512_add_ps(_mm512_shuffle_f32x4::<0x44>(a, b), _mm512_shuffle_f32x4::<0xEE>(a, b))
            };
            let by_4 = |n| {
                let (a, b) = (by_8(n), by_8(n + 2));
                _mm512_add_ps(_mm512_shuffle_f32x4::<0x88>(a, b), _mm512_shuffle_f32x4::<0xDD>(a, b))
            };
            let by_2 = |n| {
                let (a, b) = (_mm512_castps_pd(by_4(n)), _mm512_castps_pd(by_4(n + 4)));
                let (low, high) = (_mm512_unpacklo_pd(a, b), _mm512_unpackhi_pd(a, b));
                _mm512_add_ps(_mm512_castpd_ps(low), _mm512_castpd_ps(high))
            };
            let (a, b) = (by_2(0), by_2(8));
            Avx512(_mm512_add_ps(_mm512_shuffle_ps::<0x88>(a, b), _mm512_shuffle_ps::<0xDD>(a, b)))
        }
    }

    #[inline(always)]
    unsafe fn halves(lanes: __m512) -> __m256 {
        unsafe {
            let high = _mm512_castpd_ps(_mm512_castpd256_pd512(_mm512_extractf64x4_pd::<1>(_mm512_castps_pd(lanes))));
            _mm256_add_ps(_mm512_castps512_ps256(lanes), _mm512_castps512_ps256(high))
        }
    }

    /// Four sums at once, each the tree of `sum_256`: the additions of four vectors share instructions.
    #[inline(always)]
    unsafe fn sums_4(a: __m256, b: __m256, c: __m256, d: __m256) -> [f32; 4] {
        unsafe {
            let ab = _mm256_add_ps(_mm256_permute2f128_ps::<0x20>(a, b), _mm256_permute2f128_ps::<0x31>(a, b));
            let cd = _mm256_add_ps(_mm256_permute2f128_ps::<0x20>(c, d), _mm256_permute2f128_ps::<0x31>(c, d));
            let (ab, cd) = (_mm256_castps_pd(ab), _mm256_castps_pd(cd));
            let low = _mm256_castpd_ps(_mm256_unpacklo_pd(ab, cd)); // a0 a1 c0 c1 | b0 b1 d0 d1
            let high = _mm256_castpd_ps(_mm256_unpackhi_pd(ab, cd)); // a2 a3 c2 c3 | b2 b3 d2 d3
            let two = _mm256_add_ps(low, high);
            let one = _mm256_add_ps(two, _mm256_movehdup_ps(two)); // a _ c _ | b _ d _
            let (ac, bd) = (_mm256_castps256_ps128(one), _mm256_extractf128_ps::<1>(one));
            [
                _mm_cvtss_f32(ac),
                _mm_cvtss_f32(bd),
                _mm_cvtss_f32(_mm_movehl_ps(ac, ac)),
                _mm_cvtss_f32(_mm_movehl_ps(bd, bd)),
            ]
        }
    }

    #[derive(Clone, Copy)]
    pub(crate) struct Avx2(pub(crate) __m256, pub(crate) __m256);

    unsafe impl Lanes for Avx2 {
        const TILE_ROWS: usize = 2;

        #[inline(always)]
        unsafe fn splat(value: f32) -> Self {
            unsafe { Self(_mm256_set1_ps(value), _mm256_set1_ps(value)) }
        }

        #[inline(always)]
        unsafe fn load(from: *const f32) -> Self {
            unsafe { Self(_mm256_loadu_ps(from), _mm256_loadu_ps(from.add(8))) }
        }

        #[inline(always)]
        unsafe fn load_partial(from: *const f32, n: usize) -> Self {
            let mut lanes = [0.0; super::LANES];
            unsafe {
                // By bytes: `from` may have any alignment.
                std::ptr::copy_nonoverlapping(from.cast::<u8>(), lanes.as_mut_ptr().cast(), n * size_of::<f32>());
                Self::load(lanes.as_ptr())
            }
        }

        #[inline(always)]
        unsafe fn load_bf16(from: *const u16) -> Self {
            unsafe {
                let low = _mm256_cvtepu16_epi32(_mm_loadu_si128(from.cast()));
                let high = _mm256_cvtepu16_epi32(_mm_loadu_si128(from.add(8).cast()));
                let wide = |eight| _mm256_castsi256_ps(_mm256_slli_epi32::<16>(eight));
                Self(wide(low), wide(high))
            }
        }

        #[inline(always)]
        unsafe fn store(self, to: *mut f32) {
            unsafe {
                _mm256_storeu_ps(to, self.0);
                _mm256_storeu_ps(to.add(8), self.1);
            }
        }

        #[inline(always)]
        unsafe fn fma(self, a: Self, b: Self) -> Self {
            unsafe { Self(_mm256_fmadd_ps(a.0, b.0, self.0), _mm256_fmadd_ps(a.1, b.1, self.1)) }
        }

        #[inline(always)]
        unsafe fn add(self, other: Self) -> Self {
            unsafe { Self(_mm256_add_ps(self.0, other.0), _mm256_add_ps(self.1, other.1)) }
        }

        #[inline(always)]
        unsafe fn sum(self) -> f32 {
            unsafe { sum_256(_mm256_add_ps(self.0, self.1)) }
        }

        #[inline(always)]
        unsafe fn sums<const R: usize, const C: usize>(all: [[Self; C]; R]) -> [[f32; C]; R] {
            let mut sums = [[0.0; C]; R];
            let (all, to) = (all.as_ptr().cast::<Self>(), sums.as_mut_ptr().cast::<f32>());
            let mut n = 0;
            unsafe {
                while n + 4 <= R * C {
                    let four = |i| {
                        let Self(low, high) = *all.add(n + i);
                        _mm256_add_ps(low, high)
                    };
                    to.add(n).cast::<[f32; 4]>().write_unaligned(sums_4(four(0), four(1), four(2), four(3)));
                    n += 4;
                }
                while n < R * C {
                    *to.add(n) = (*all.add(n)).sum();
                    n += 1;
                }
            }
            sums
        }
    }

    #[inline(always)]
    unsafe fn sum_256(eight: __m256) -> f32 {
        unsafe {
            let four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps::<1>(eight));
            let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
            _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps::<1>(two, two)))
        }
    }
}

#[cfg(test)]
mod tests;
