//! Memory of a device that other processes of the machine map and read (CUDA IPC): see [`crate::window`].
//!
//! The memory pool that everything else comes from cannot be shared this way, so shared memory is taken by itself.

use std::{fs, sync::Arc};

use cudarc::driver::{
    CudaContext, DriverError, result,
    sys::{self, CUipcMem_flags, CUipcMemHandle, CUresult},
};

use super::{buffer::DeviceBuffer, device::Gpu, error::CudaError};
use crate::{
    Precision,
    window::{HANDLE_BYTES, WindowHandle},
};

/// Says which boot of which machine this is; the same in all containers of a machine.
const MACHINE: &str = "/proc/sys/kernel/random/boot_id";
/// Smaller pieces of memory share one of this size, and a handle names all of it.
const PIECE_BYTES: usize = 2 << 20;

/// Memory that others may be given a handle of.
#[derive(Debug)]
pub(super) struct Shareable {
    context: Arc<CudaContext>,
    address: u64,
    bytes: usize,
}

/// Memory of another process.
#[derive(Debug)]
pub struct Mapped {
    context: Arc<CudaContext>,
    address: u64,
}

/// How a coordinator's rows lie in what it shares: x (rows, d_model), then the token of each place.
#[derive(Clone, Copy, Debug)]
pub(super) struct RowsLayout {
    pub(super) rows: usize,
    /// Experts of each row.
    choices: usize,
    row_bytes: usize,
}

/// A coordinator's rows, as it shares them.
#[derive(Debug)]
pub struct SharedRows {
    handle: WindowHandle,
    /// Bytes of the results of all places.
    results_bytes: usize,
    memory: Arc<Shareable>,
}

/// A node's side: a coordinator's rows, and where its own results go.
#[derive(Debug)]
pub(super) struct PeerRows {
    pub(super) layout: RowsLayout,
    pub(super) rows: Mapped,
    /// (places, d_model), float32.
    pub(super) out: Shareable,
    pub(super) results: WindowHandle,
    /// (places, d_model): the rows of a call, brought here.
    pub(super) x: DeviceBuffer<u8>,
}

impl Shareable {
    pub(super) fn take(gpu: &Gpu, what: &'static str, bytes: usize) -> Result<Self, CudaError> {
        gpu.enter()?;
        let bytes = bytes.next_multiple_of(PIECE_BYTES);
        // SAFETY: whoever takes it writes it before it is read.
        let address = unsafe { result::malloc_sync(bytes) }.map_err(|source| match source.0 {
            CUresult::CUDA_ERROR_OUT_OF_MEMORY => CudaError::OutOfMemory { what, bytes },
            _ => CudaError::Driver { call: "cuMemAlloc", source },
        })?;
        Ok(Self { context: gpu.context().clone(), address, bytes })
    }

    pub(super) fn address(&self) -> u64 {
        self.address
    }

    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }

    fn handle(&self, rows: usize, precision: Precision) -> Result<WindowHandle, CudaError> {
        let machine = machine()?;
        self.context.bind_to_thread().map_err(refused("cuCtxSetCurrent"))?;
        let mut handle = CUipcMemHandle { reserved: [0; HANDLE_BYTES] };
        // SAFETY: writes the handle of memory of ours.
        unsafe { sys::cuIpcGetMemHandle(&mut handle, self.address) }.result().map_err(refused("cuIpcGetMemHandle"))?;
        Ok(WindowHandle { machine, memory: handle.reserved.map(|byte| byte as u8), rows, precision })
    }
}

impl Drop for Shareable {
    fn drop(&mut self) {
        // What still runs with it ends first. An error says that the device is lost, and all of its memory with it.
        let _ = self.context.bind_to_thread();
        let _ = self.context.synchronize();
        // SAFETY: taken in `take`, once; whoever maps it keeps it until they are through.
        let _ = unsafe { result::free_sync(self.address) };
    }
}

impl Mapped {
    /// Maps what `handle` names, which must hold so many bytes.
    fn open(gpu: &Arc<CudaContext>, handle: &WindowHandle, bytes: usize) -> Result<Self, CudaError> {
        let own = machine()?;
        if handle.machine != own {
            let reason = format!("it is of another machine ({}, this is {own})", handle.machine);
            return Err(CudaError::Window { reason });
        }
        gpu.bind_to_thread().map_err(refused("cuCtxSetCurrent"))?;
        let memory = CUipcMemHandle { reserved: handle.memory.map(|byte| byte as _) };
        let flags = CUipcMem_flags::CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS as u32;
        let mut address = 0;
        // SAFETY: the driver refuses a handle that is not one; writes one address.
        unsafe { sys::cuIpcOpenMemHandle_v2(&mut address, memory, flags) }
            .result()
            .map_err(refused("cuIpcOpenMemHandle"))?;
        let mapped = Self { context: gpu.clone(), address };
        let (mut base, mut found) = (0, 0);
        // SAFETY: writes two numbers of memory that was mapped above.
        unsafe { sys::cuMemGetAddressRange_v2(&mut base, &mut found, address) }
            .result()
            .map_err(refused("cuMemGetAddressRange"))?;
        let found = found.saturating_sub((address - base) as usize);
        if found < bytes {
            return Err(CudaError::Window { reason: format!("it has {found} bytes, expected {bytes}") });
        }
        Ok(mapped)
    }

    pub(super) fn address(&self) -> u64 {
        self.address
    }
}

impl Drop for Mapped {
    fn drop(&mut self) {
        // As above: nothing of ours may still read it.
        let _ = self.context.bind_to_thread();
        let _ = self.context.synchronize();
        // SAFETY: mapped in `open`, once.
        let _ = unsafe { sys::cuIpcCloseMemHandle(self.address) };
    }
}

impl RowsLayout {
    pub(super) fn new(rows: usize, choices: usize, d_model: usize, precision: Precision) -> Self {
        Self { rows, choices, row_bytes: d_model * precision.size() }
    }

    /// Of all rows in grouped order.
    pub(super) fn places(self) -> usize {
        self.rows * self.choices
    }

    pub(super) fn x_bytes(self) -> usize {
        self.rows * self.row_bytes
    }

    pub(super) fn order_at(self) -> usize {
        self.x_bytes().next_multiple_of(16)
    }

    pub(super) fn order_bytes(self) -> usize {
        self.places() * 4
    }

    pub(super) fn bytes(self) -> usize {
        self.order_at() + self.order_bytes()
    }
}

impl SharedRows {
    /// Of memory that lies as `layout` says.
    pub(super) fn new(
        memory: &Arc<Shareable>,
        layout: RowsLayout,
        d_model: usize,
        precision: Precision,
    ) -> Result<Self, CudaError> {
        let handle = memory.handle(layout.rows, precision)?;
        Ok(Self { handle, results_bytes: layout.places() * d_model * 4, memory: memory.clone() })
    }

    pub(crate) fn handle(&self) -> &WindowHandle {
        &self.handle
    }

    pub(crate) fn open_results(&self, results: &WindowHandle) -> Result<Mapped, CudaError> {
        let (expected, found) = ((self.handle.rows, Precision::F32), (results.rows, results.precision));
        if found != expected {
            return Err(CudaError::Window { reason: format!("results are {found:?}, expected {expected:?}") });
        }
        Mapped::open(&self.memory.context, results, self.results_bytes)
    }
}

impl PeerRows {
    /// Maps a coordinator's rows, and takes memory for the results.
    pub(super) fn open(
        gpu: &Gpu,
        offered: &WindowHandle,
        choices: usize,
        d_model: usize,
        precision: Precision,
    ) -> Result<Self, CudaError> {
        if offered.precision != precision {
            let found = offered.precision;
            return Err(CudaError::Window {
                reason: format!("its rows are {found}, this node computes in {precision}"),
            });
        }
        let layout = RowsLayout::new(offered.rows, choices, d_model, precision);
        let rows = Mapped::open(gpu.context(), offered, layout.bytes())?;
        let out = Shareable::take(gpu, "results", layout.places() * d_model * 4)?;
        let results = out.handle(layout.rows, Precision::F32)?;
        let x = gpu.allocate("activations", layout.places() * d_model * precision.size())?;
        gpu.finish()?;
        Ok(Self { layout, rows, out, results, x })
    }
}

fn machine() -> Result<String, CudaError> {
    let read = fs::read_to_string(MACHINE);
    let read = read.map_err(|error| CudaError::Window { reason: format!("{MACHINE} cannot be read: {error}") })?;
    Ok(read.trim().to_owned())
}

/// That memory cannot be shared says nothing of the device.
fn refused(call: &'static str) -> impl Fn(DriverError) -> CudaError {
    move |error| CudaError::Window { reason: format!("{call}: {error}") }
}
