//! One GPU: its context, its streams, and the calls that everything else here makes on it. A computation and the copies
//! that feed it are on streams of their own; what must wait for what is said by events.
//!
//! Any thread may call a [`Gpu`] that it has entered. The compute stream does what it is given in the order of the calls, and
//! gives memory back in that order, too; so whoever gives it several things that belong together sees to it that no other
//! thread comes between: a model by `&mut`, an expert-node's slab by its lock.

use std::{ffi::c_void, sync::Arc};

use bytemuck::Pod;
use cudarc::driver::{
    CudaContext, CudaEvent, CudaStream, DevicePtr, PinnedHostSlice, result,
    sys::{
        self, CUdevice_attribute, CUlaunchAttribute, CUlaunchAttributeID, CUlaunchAttributeValue, CUlaunchConfig,
        CUresult,
    },
};

use super::{
    buffer::{DeviceBuffer, DeviceSlice},
    error::{CudaError, failed},
    kernels::Kernel,
};

/// The oldest CUDA that a driver must speak: what the library loads is named after it.
const DRIVER_MIN: (i32, &str) = (13_000, "13.0");
/// bf16 tensor cores and asynchronous copies to shared memory came with Ampere.
const CAPABILITY_MIN: ((i32, i32), &str) = ((8, 0), "8.0");

/// From Hopper on kernels wait for others by themselves.
const OVERLAP_CAPABILITY: (i32, i32) = (9, 0);

/// What a GPU is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GpuDescription {
    /// As its maker calls it.
    pub name: String,
    /// Compute capability.
    pub capability: (i32, i32),
    /// All of its memory.
    pub bytes: u64,
    /// What of it is not taken.
    pub bytes_free: u64,
    /// How many blocks it runs side by side at least.
    pub multiprocessors: usize,
    /// The CUDA that the driver speaks: 13000 is 13.0.
    pub driver: i32,
}

/// A device, and the streams of work on it.
#[derive(Debug)]
pub struct Gpu {
    context: Arc<CudaContext>,
    /// Kernels, and what they read and write.
    pub(super) compute: Arc<CudaStream>,
    description: GpuDescription,
}

impl Gpu {
    /// Opens a device. Fails with a typed error, never a panic, where there is no driver or no such device.
    pub fn open(ordinal: usize) -> Result<Self, CudaError> {
        // SAFETY: loads a library, whose initialisers NVIDIA vouches for.
        if !unsafe { sys::is_culib_present() } {
            return Err(CudaError::NoDriver);
        }
        // SAFETY: as above.
        if !unsafe { cudarc::nvrtc::sys::is_culib_present() } {
            return Err(CudaError::NoCompiler);
        }
        let driver = driver_version()?;
        if driver < DRIVER_MIN.0 {
            let (major, minor) = (driver / 1000, driver % 1000 / 10);
            return Err(CudaError::OldDriver { major, minor, expected: DRIVER_MIN.1 });
        }
        let found = CudaContext::device_count().map_err(failed("cuDeviceGetCount"))? as usize;
        if ordinal >= found {
            return Err(CudaError::NoDevice { ordinal, found });
        }
        let context = CudaContext::new(ordinal).map_err(failed("cuDevicePrimaryCtxRetain"))?;
        // SAFETY: streams are ordered by events of ours; the library's, one per buffer and launch, are not needed.
        unsafe { context.disable_event_tracking() };
        let description = describe(&context, driver)?;
        let capability = description.capability;
        if capability < CAPABILITY_MIN.0 {
            let (device, (major, minor)) = (description.name, capability);
            return Err(CudaError::OldDevice { device, major, minor, expected: CAPABILITY_MIN.1 });
        }
        let compute = context.new_stream().map_err(failed("cuStreamCreate"))?;
        Ok(Self { compute, description, context })
    }

    /// What it is; free memory as it was when it was opened.
    pub fn description(&self) -> &GpuDescription {
        &self.description
    }

    /// Free and total bytes now.
    pub fn memory(&self) -> Result<(u64, u64), CudaError> {
        let (free, total) = self.context.mem_get_info().map_err(failed("cuMemGetInfo"))?;
        Ok((free as u64, total as u64))
    }

    /// Makes the device the calling thread's. To be called before anything else on a thread that may be new.
    pub(super) fn enter(&self) -> Result<(), CudaError> {
        self.context.bind_to_thread().map_err(failed("cuCtxSetCurrent"))
    }

    /// Takes memory for so many values, which are anything. At least 16 bytes, since nothing has no address.
    pub(super) fn allocate<T: Pod>(&self, what: &'static str, len: usize) -> Result<DeviceBuffer<T>, CudaError> {
        let bytes = len.saturating_mul(size_of::<T>());
        // SAFETY: whoever takes it writes it before it is read.
        let slice = unsafe { self.compute.alloc::<u8>(bytes.max(16)) }.map_err(|source| match source.0 {
            CUresult::CUDA_ERROR_OUT_OF_MEMORY => CudaError::OutOfMemory { what, bytes },
            _ => CudaError::Driver { call: "cuMemAllocAsync", source },
        })?;
        let address = slice.device_ptr(&self.compute).0;
        Ok(DeviceBuffer::pooled(slice, address, len))
    }

    /// Takes memory and fills it. Returns when `values` may go.
    pub(super) fn allocate_with<T: Pod>(&self, what: &'static str, values: &[T]) -> Result<DeviceBuffer<T>, CudaError> {
        let memory = self.allocate(what, values.len())?;
        self.write(memory.all(), values)?;
        Ok(memory)
    }

    /// Page-locked memory of the host, which the device copies from without help. Holds anything.
    pub(super) fn pinned(&self, bytes: usize) -> Result<PinnedHostSlice<u8>, CudaError> {
        self.enter()?;
        // SAFETY: whoever takes it writes it before it is read.
        unsafe { self.context.alloc_pinned_with_flags::<u8>(bytes, 0) }.map_err(failed("cuMemHostAlloc"))
    }

    /// Writes all of `values` to the beginning of `to`, in the order of the compute stream. Returns when they may go.
    pub(super) fn write<T: Pod>(&self, to: DeviceSlice<'_, T>, values: &[T]) -> Result<(), CudaError> {
        let to = to.slice(0..values.len());
        // SAFETY: `to` has that length; from pageable memory the call returns after a copy was made.
        unsafe { result::memcpy_htod_async(to.address(), values, self.compute.cu_stream()) }
            .map_err(failed("cuMemcpyHtoDAsync"))
    }

    /// Reads values back, as many as `into` holds, after all that the compute stream was given.
    pub(super) fn read<T: Pod>(&self, from: DeviceSlice<'_, T>, into: &mut [T]) -> Result<(), CudaError> {
        // SAFETY: `into` outlives the call, which waits below.
        unsafe { self.start_reading(from, into) }?;
        self.finish()
    }

    /// Starts reading values back, as many as `into` holds, in the order of the compute stream.
    ///
    /// # Safety
    /// `into` is neither touched nor freed before the stream comes there, which [`Gpu::finish`] waits for.
    pub(super) unsafe fn start_reading<T: Pod>(
        &self,
        from: DeviceSlice<'_, T>,
        into: &mut [T],
    ) -> Result<(), CudaError> {
        let from = from.slice(0..into.len());
        // SAFETY: `from` has that length; the rest by the caller's promise.
        unsafe { result::memcpy_dtoh_async(into, from.address(), self.compute.cu_stream()) }
            .map_err(failed("cuMemcpyDtoHAsync"))
    }

    /// Sets every byte of values to `byte`, in the order of the compute stream.
    pub(super) fn fill<T: Pod>(&self, values: DeviceSlice<'_, T>, byte: u8) -> Result<(), CudaError> {
        let (bytes, stream) = (values.len() * size_of::<T>(), self.compute.cu_stream());
        // SAFETY: it is as long, and any bytes are such values.
        unsafe { result::memset_d8_async(values.address(), byte, bytes, stream) }.map_err(failed("cuMemsetD8Async"))
    }

    /// Copies all of `from` to the beginning of `to`, in the order of the compute stream.
    pub(super) fn copy<T: Pod>(&self, from: DeviceSlice<'_, T>, to: DeviceSlice<'_, T>) -> Result<(), CudaError> {
        let (to, bytes) = (to.slice(0..from.len()), from.len() * size_of::<T>());
        // SAFETY: both are as long.
        unsafe { result::memcpy_dtod_async(to.address(), from.address(), bytes, self.compute.cu_stream()) }
            .map_err(failed("cuMemcpyDtoDAsync"))
    }

    /// Starts a copy of all of `from`, which is page-locked memory, to the beginning of `to` on a stream.
    ///
    /// # Safety
    /// Until that stream is done, `from` is not written and `to` is touched by nothing else.
    pub(super) unsafe fn upload(
        &self,
        stream: &CudaStream,
        from: &[u8],
        to: DeviceSlice<'_, u8>,
    ) -> Result<(), CudaError> {
        let to = to.slice(0..from.len());
        // SAFETY: `to` has that length; the rest by the caller's promise.
        unsafe { result::memcpy_htod_async(to.address(), from, stream.cu_stream()) }
            .map_err(failed("cuMemcpyHtoDAsync"))
    }

    /// Starts a kernel on the compute stream. `arguments` is the one structure it takes. Where the device can, it is brought
    /// there while a kernel before it still runs, for which it waits itself (`begin` of numbers.cu).
    ///
    /// # Safety
    /// The structure is the kernel's, as `arguments.rs` says. What its addresses name lives until the stream is done with
    /// it, and holds all that the kernel touches with this grid and these numbers.
    pub(super) unsafe fn launch<A: Copy>(
        &self,
        kernel: &Kernel,
        grid: (usize, usize, usize),
        threads: u32,
        arguments: &A,
    ) -> Result<(), CudaError> {
        let mut parameters = [std::ptr::from_ref(arguments).cast_mut().cast::<c_void>()];
        let mut overlap = CUlaunchAttribute {
            id: CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
            pad: [0; 4],
            value: CUlaunchAttributeValue { programmaticStreamSerializationAllowed: 1 },
        };
        let config = CUlaunchConfig {
            gridDimX: grid.0 as u32,
            gridDimY: grid.1 as u32,
            gridDimZ: grid.2 as u32,
            blockDimX: threads,
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: kernel.shared_bytes,
            hStream: self.compute.cu_stream(),
            attrs: &raw mut overlap,
            numAttrs: u32::from(self.description.capability >= OVERLAP_CAPABILITY),
        };
        let (function, parameters) = (kernel.function.cu_function(), parameters.as_mut_ptr());
        // SAFETY: the structure is copied by the call; the rest by the caller's promise.
        unsafe { sys::cuLaunchKernelEx(&config, function, parameters, std::ptr::null_mut()) }
            .result()
            .map_err(failed("cuLaunchKernelEx"))
    }

    /// Has `then` called from a thread of the driver when the compute stream comes to here, or dropped if it never does. It must
    /// not call the device.
    pub(super) fn call_back(&self, then: Box<dyn FnOnce() + Send>) -> Result<(), CudaError> {
        unsafe extern "C" fn call(then: *mut c_void) {
            // SAFETY: what `into_raw` below gave, once.
            let then = unsafe { Box::from_raw(then.cast::<Box<dyn FnOnce() + Send>>()) };
            then();
        }
        let then = Box::into_raw(Box::new(then));
        // SAFETY: `call` takes what it is given, and is called at most once.
        let started = unsafe { result::stream::launch_host_function(self.compute.cu_stream(), call, then.cast()) };
        started.map_err(|source| {
            // It may give up what the work before it still uses. An error says that there is no such work any more.
            let _ = self.finish();
            // SAFETY: it was not started, so nobody else takes it.
            drop(unsafe { Box::from_raw(then) });
            failed("cuLaunchHostFunc")(source)
        })
    }

    /// Another stream, whose copies run beside what the compute stream does.
    pub(super) fn stream(&self) -> Result<Arc<CudaStream>, CudaError> {
        self.context.new_stream().map_err(failed("cuStreamCreate"))
    }

    /// An event that marks no work yet.
    pub(super) fn event(&self) -> Result<CudaEvent, CudaError> {
        self.context.new_event(None).map_err(failed("cuEventCreate"))
    }

    /// Waits until the compute stream is done, and learns whether its work failed.
    pub(super) fn finish(&self) -> Result<(), CudaError> {
        self.compute.synchronize().map_err(failed("cuStreamSynchronize"))
    }

    /// Whether both are the same device of this process.
    pub(super) fn is_same(&self, other: &Self) -> bool {
        self.context.cu_ctx() == other.context.cu_ctx()
    }

    pub(super) fn context(&self) -> &Arc<CudaContext> {
        &self.context
    }
}

fn driver_version() -> Result<i32, CudaError> {
    let mut version = 0;
    // SAFETY: writes one number.
    let status = unsafe { sys::cuDriverGetVersion(&mut version) };
    status.result().map_err(failed("cuDriverGetVersion"))?;
    Ok(version)
}

fn describe(context: &Arc<CudaContext>, driver: i32) -> Result<GpuDescription, CudaError> {
    let attribute = CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT;
    let (free, total) = context.mem_get_info().map_err(failed("cuMemGetInfo"))?;
    Ok(GpuDescription {
        name: context.name().map_err(failed("cuDeviceGetName"))?,
        capability: context.compute_capability().map_err(failed("cuDeviceGetAttribute"))?,
        bytes: total as u64,
        bytes_free: free as u64,
        multiprocessors: context.attribute(attribute).map_err(failed("cuDeviceGetAttribute"))? as usize,
        driver,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A machine without a GPU would end with a panic of the library that loads the driver.
    #[test]
    fn without_a_driver_it_is_an_error() {
        match Gpu::open(0) {
            Ok(gpu) => assert!(gpu.description().bytes > 0),
            Err(error) => assert!(error.is_missing_device(), "{error}"),
        }
    }
}
