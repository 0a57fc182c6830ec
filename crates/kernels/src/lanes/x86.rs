//! [`Lanes`] as AVX-512, and as AVX2 with FMA.
//!
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
                let high =
                    _mm512_mask_add_epi32(_mm512_add_epi32(lane, step), in_high, lane, _mm512_set1_epi32(LANES as i32));
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
    unsafe fn prefetch_line(at: *const u8) {
        unsafe { _mm_prefetch::<_MM_HINT_T0>(at.cast()) };
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
