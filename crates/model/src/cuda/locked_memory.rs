//! Page-locked memory of the host, which a device copies from without help, in large pieces: huge pages, touched by all
//! threads and locked when they are there. The driver's own allocation takes its pages one by one, ten times as slowly
//! (docs/decisions/0009-cuda.md).

use std::{
    ops::{Deref, DerefMut},
    sync::Arc,
};

use cudarc::driver::{CudaContext, sys};
use memmap2::{Advice, MmapMut};
use rayon::prelude::*;

use super::{
    device::Gpu,
    error::{CudaError, failed},
};

/// What a thread touches at a time: a huge page.
const HUGE_PAGE_BYTES: usize = 2 << 20;
const PAGE_BYTES: usize = 4 << 10;

/// Page-locked memory of the host. Zeros at first.
#[derive(Debug)]
pub(super) struct LockedMemory {
    pages: MmapMut,
    context: Arc<CudaContext>,
}

impl LockedMemory {
    /// Takes so many bytes, more than none.
    pub(super) fn take(gpu: &Gpu, bytes: usize) -> Result<Self, CudaError> {
        gpu.enter()?;
        let mut pages = MmapMut::map_anon(bytes).map_err(|source| CudaError::Host { bytes, source })?;
        // Where there are none, small pages only take longer.
        let _ = pages.advise(Advice::HugePage);
        let touch = |part: &mut [u8]| part.iter_mut().step_by(PAGE_BYTES).for_each(|byte| *byte = 0);
        pages.par_chunks_mut(HUGE_PAGE_BYTES).for_each(touch);
        // SAFETY: memory of ours, which is unlocked below before it is given back.
        unsafe { sys::cuMemHostRegister_v2(pages.as_mut_ptr().cast(), bytes, 0) }
            .result()
            .map_err(failed("cuMemHostRegister"))?;
        Ok(Self { pages, context: gpu.context().clone() })
    }
}

impl Deref for LockedMemory {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.pages
    }
}

impl DerefMut for LockedMemory {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.pages
    }
}

impl Drop for LockedMemory {
    fn drop(&mut self) {
        // An error says that the device is lost, and with it all that was locked for it.
        let _ = self.context.bind_to_thread();
        // SAFETY: locked in `take`, once; whoever copies from it ends its copies first.
        let _ = unsafe { sys::cuMemHostUnregister(self.pages.as_mut_ptr().cast()) };
    }
}
