//! The experts of an expert-node on a GPU: a slab of slots, uploads on streams of their own, and the products of an
//! expert for rows that others send. Which expert is where is decided by the node, which also promises that nobody
//! computes with a slot that is being loaded.
//!
//! Uploads may come from any thread at any time. A computation for rows from the host has the buffers of [`Work`], and the
//! compute stream, for itself.

use std::sync::Arc;

use bytemuck::{cast_slice, cast_slice_mut};
use cudarc::driver::PinnedHostSlice;
use parking_lot::Mutex;
use sida_routing::{ExpertKey, LayerId};

use super::{
    arguments::Fetch,
    buffer::DeviceBuffer,
    dense::DeviceDense,
    device::Gpu,
    error::{CudaError, failed},
    grouped::{Grouped, Results, Slots, Tiles},
    host_tier::{Found, HostTier},
    kernels::Kernels,
    uploads::Uploads,
    weights,
    window::PeerRows,
};
use crate::{
    DeviceSlots, ExpertDevice, ExpertShape, ExpertSlot, ExpertStore, ExpertWindow, ModelError, Precision, RowsOnDevice,
    SlotRows, SlotRun, Urgency, WindowHandle, expert_slot::Layout,
};

/// Rows computed at once; more take turns.
const ROWS_MAX: usize = 4096;

/// Slots of one expert each on a device, and what loads into them and computes with them.
#[derive(Debug)]
pub struct DeviceSlab {
    gpu: Gpu,
    kernels: Kernels,
    shape: ExpertShape,
    precision: Precision,
    /// Experts of each row of the model.
    choices: usize,
    /// Has the memory of the slots.
    loads: Uploads,
    slots: Slots,
    host: Mutex<HostTier>,
    work: Mutex<Work>,
}

/// What a computation works in: [`ROWS_MAX`] rows.
#[derive(Debug)]
struct Work {
    /// What is sent, in one copy: how many tiles there are, the tiles, then x.
    packet: DeviceBuffer<u8>,
    /// (rows, d_ff), in the model's precision.
    hidden: DeviceBuffer<u8>,
    /// (rows, d_model)
    out: DeviceBuffer<f32>,
    /// Rows come grouped: place i is row i.
    order: DeviceBuffer<u32>,
    /// The packet on its way there, the results on their way back.
    staging: PinnedHostSlice<u8>,
}

impl DeviceSlab {
    /// Takes `slots` slots on the device, and `host_bytes` of page-locked memory as experts come to need it.
    pub fn open(
        gpu: Gpu,
        store: ExpertStore,
        slot: ExpertSlot,
        slots: usize,
        host_bytes: u64,
    ) -> Result<Self, CudaError> {
        let precision = slot.precision();
        weights::check(store.config())?;
        gpu.enter()?;
        let formats: Vec<_> = slot.layouts().filter_map(Layout::format).collect();
        let kernels = Kernels::compile(&gpu, precision, &formats, store.config().d_kv)?;
        let (shape, choices) = (*slot.shape(), store.config().top_k);
        let memory = gpu.allocate("experts", slots * slot.bytes())?;
        let slots = Slots::new(memory.address(), &slot);
        let loads = Uploads::new(&gpu, memory, slot.bytes())?;
        let work = Work::new(&gpu, &shape)?;
        let host = HostTier::open(&gpu, store, slot, host_bytes)?;
        gpu.finish()?;
        let (host, work) = (Mutex::new(host), Mutex::new(work));
        Ok(Self { gpu, kernels, shape, precision, choices, loads, slots, host, work })
    }

    fn begin(&self, key: ExpertKey, slot: usize, urgency: Urgency) -> Result<(), CudaError> {
        self.gpu.enter()?;
        let mut host = self.host.lock();
        let found = host.find(&self.gpu, key)?;
        let in_slices = urgency == Urgency::Ahead && found.read.is_none();
        if !in_slices {
            // SAFETY: nobody computes with the slot (see the trait), and a place that is used again is written only after its
            // mark.
            return unsafe { self.loads.begin(&self.gpu, &found, slot, urgency, false) };
        }
        // SAFETY: an expert that stays in memory is written once, and freed after the uploads.
        let bytes = unsafe { std::slice::from_raw_parts(found.bytes.as_ptr(), found.bytes.len()) };
        // A demand must find its expert meanwhile.
        drop(host);
        // SAFETY: nobody computes with the slot, and the bytes stay as they are.
        unsafe { self.loads.begin(&self.gpu, &Found { bytes, read: None }, slot, urgency, true) }
    }

    /// As many groups as fit, from `groups` on; what is left of a group that is cut is computed next.
    fn compute_some(&self, layer: LayerId, groups: &mut [Part<'_, '_>]) -> Result<(), CudaError> {
        let d_model = self.shape.d_model;
        let (mut runs, mut rows) = (Vec::with_capacity(groups.len()), 0);
        for part in groups.iter() {
            runs.push(SlotRun { slot: part.group.slot, first: rows, rows: part.rows.len() });
            rows += part.rows.len();
        }
        let tiles = Tiles::of(&self.kernels, &self.slots, &runs);
        let work = &mut *self.work.lock();
        self.gpu.enter()?;
        let staging = work.staging.as_mut_slice().map_err(failed("cuEventSynchronize"))?;
        let packet = tiles.packet();
        staging[..packet.len()].copy_from_slice(&packet);
        let mut at = packet.len();
        for part in groups.iter() {
            let x = &part.group.x[part.rows.start * d_model..part.rows.end * d_model];
            let bytes = x.len() * self.precision.size();
            self.precision.narrow(x, &mut staging[at..at + bytes]);
            at += bytes;
        }
        let base = work.packet.address();
        // SAFETY: the staging memory is written again only after `finish` below, or after the next one if that fails; the
        // stream orders the rest.
        unsafe { self.gpu.upload(&self.gpu.compute, &staging[..at], work.packet.all()) }?;
        let out = work.out.first(rows * d_model);
        let memory = Memory {
            x: base + packet.len() as u64,
            out: out.address(),
            order: work.order.address(),
            hidden: work.hidden.address(),
        };
        // SAFETY: `work` has room for so many rows, and is locked until the stream is done.
        unsafe { self.start(layer, &tiles, base, memory) }?;
        let mut from: &mut [f32] = cast_slice_mut(&mut staging[..out.len() * 4]);
        self.gpu.read(out, from)?;
        for part in groups {
            let out = &mut part.group.out[part.rows.start * d_model..part.rows.end * d_model];
            let (own, rest) = from.split_at_mut(out.len());
            out.copy_from_slice(own);
            from = rest;
        }
        Ok(())
    }

    /// Rows of a coordinator in another process, at most [`ROWS_MAX`]; `first` of a run is its place in the window.
    fn compute_in(&self, peer: &PeerRows, layer: LayerId, runs: &[SlotRun]) -> Result<(), CudaError> {
        let places: Vec<u32> = runs.iter().flat_map(|run| run.first as u32..(run.first + run.rows) as u32).collect();
        let mut first = 0;
        let consecutive = |run: &SlotRun| {
            first += run.rows;
            SlotRun { first: first - run.rows, ..*run }
        };
        let tiles = Tiles::of(&self.kernels, &self.slots, &runs.iter().map(consecutive).collect::<Vec<_>>());
        let packet = [&tiles.packet()[..], cast_slice(&places)].concat();
        let work = &mut *self.work.lock();
        self.gpu.enter()?;
        let base = work.packet.address();
        self.gpu.write(work.packet.all(), &packet)?;
        let places_at = base + (packet.len() - size_of_val(&places[..])) as u64;
        let fetch = Fetch {
            x: peer.rows.address(),
            order: peer.rows.address() + peer.layout.order_at() as u64,
            places: places_at,
            out: peer.x.address(),
            rows: peer.layout.rows as i32,
            d: self.shape.d_model as i32,
        };
        // SAFETY: the kernel reads rows of the window only, of which the packet has the places, and writes as many of x, which
        // has room for all of them.
        unsafe { self.gpu.launch(&self.kernels.fetch_rows, (places.len(), 1, 1), 128, &fetch) }?;
        let memory =
            Memory { x: peer.x.address(), out: peer.out.address(), order: places_at, hidden: work.hidden.address() };
        // SAFETY: `peer` has room for so many rows, and it and `work` stay until the stream is done.
        unsafe { self.start(layer, &tiles, base, memory) }?;
        self.gpu.finish()
    }

    /// Starts the products of a layer's rows whose tiles were sent to `packet`.
    ///
    /// # Safety
    /// `memory` has room for so many rows, and lives until the stream is done with it.
    unsafe fn start(&self, layer: LayerId, tiles: &Tiles, packet: u64, memory: Memory) -> Result<(), CudaError> {
        let (counts, few, many) = tiles.addresses(packet);
        let Memory { x, out, order, hidden } = memory;
        let grouped = Grouped {
            gpu: &self.gpu,
            kernels: &self.kernels,
            d_model: self.shape.d_model,
            d_ff: self.shape.d_ff,
            x,
            hidden,
            out,
            results: Results::Each,
            order,
            to: order,
            slots: self.slots.of(layer),
            few,
            many,
            counts,
            others: tiles.others,
            layers: 0,
            guard: 0,
        };
        // SAFETY: the node computes with slots only whose experts are there, and keeps them meanwhile (see the trait); the
        // rest by the caller's promise.
        unsafe { grouped.start(tiles.few.len(), tiles.many.len()) }
    }
}

/// Where rows and results of a computation are on the device; see [`Grouped`].
struct Memory {
    x: u64,
    out: u64,
    order: u64,
    hidden: u64,
}

/// Rows of a group that are computed at once.
struct Part<'g, 'a> {
    group: &'g mut SlotRows<'a>,
    rows: std::ops::Range<usize>,
}

impl ExpertDevice for DeviceSlab {
    fn shape(&self) -> &ExpertShape {
        &self.shape
    }

    fn begin_load(&self, key: ExpertKey, slot: usize, urgency: Urgency) -> Result<(), ModelError> {
        Ok(self.begin(key, slot, urgency)?)
    }

    fn finish_load(&self, slot: usize) -> Result<(), ModelError> {
        self.gpu.enter()?;
        Ok(self.loads.wait_done(slot)?)
    }

    fn keep_near(&self, key: ExpertKey) -> Result<(), ModelError> {
        self.gpu.enter()?;
        Ok(self.host.lock().keep_near(&self.gpu, key)?)
    }

    fn compute(&self, layer: LayerId, groups: &mut [SlotRows<'_>]) -> Result<(), ModelError> {
        let mut parts: Vec<Part<'_, '_>> = Vec::with_capacity(groups.len());
        let mut rows = 0;
        for group in groups {
            let all = group.x.len() / self.shape.d_model;
            let mut done = 0;
            // A group that does not fit with those before it waits, one that fits nowhere is cut.
            while all - done > ROWS_MAX {
                self.compute_some(layer, &mut [Part { group, rows: done..done + ROWS_MAX }])?;
                done += ROWS_MAX;
            }
            if rows + all - done > ROWS_MAX {
                self.compute_some(layer, &mut parts)?;
                parts.clear();
                rows = 0;
            }
            rows += all - done;
            parts.push(Part { group, rows: done..all });
        }
        Ok(self.compute_some(layer, &mut parts)?)
    }

    fn is_beside(&self, rows: &RowsOnDevice<'_>) -> bool {
        let DeviceDense { gpu, precision, config, kernels, .. } = &*rows.dense;
        let shape = (config.d_model, config.d_ff, *precision);
        let is_alike = shape == (self.shape.d_model, self.shape.d_ff, self.precision);
        gpu.is_same(&self.gpu) && is_alike && self.slots.layouts().all(|layout| kernels.few.experts_in(layout).is_ok())
    }

    fn slots_beside(self: Arc<Self>, rows: &RowsOnDevice<'_>) -> Option<DeviceSlots> {
        self.is_beside(rows).then(|| DeviceSlots::new(self.slots.clone(), self.clone()))
    }

    fn start_beside(
        &self,
        rows: &RowsOnDevice<'_>,
        layer: LayerId,
        groups: &[SlotRun],
        done: Box<dyn FnOnce() + Send>,
    ) -> Result<(), ModelError> {
        let dense = &*rows.dense;
        // SAFETY: the node computes with slots only whose experts are there, and keeps them until `done` (see the trait).
        if let Err(error) = unsafe { dense.start_experts(&self.kernels, &self.slots, layer, groups) } {
            // What was started may still read the slots, which `done` gives up.
            dense.gpu.finish()?;
            drop(done);
            return Err(error.into());
        }
        Ok(dense.gpu.call_back(done)?)
    }

    fn open_window(self: Arc<Self>, rows: &WindowHandle) -> Result<Arc<dyn ExpertWindow>, ModelError> {
        let peer = PeerRows::open(&self.gpu, rows, self.choices, self.shape.d_model, self.precision)?;
        Ok(Arc::new(SlabWindow { peer, slab: self }))
    }
}

/// A coordinator's rows, for the experts of a slab.
struct SlabWindow {
    peer: PeerRows,
    slab: Arc<DeviceSlab>,
}

impl ExpertWindow for SlabWindow {
    fn rows(&self) -> usize {
        self.peer.layout.places()
    }

    fn results(&self) -> &WindowHandle {
        &self.peer.results
    }

    fn compute(&self, layer: LayerId, runs: &[SlotRun]) -> Result<(), ModelError> {
        let (mut part, mut rows) = (Vec::with_capacity(runs.len()), 0);
        for run in runs {
            let mut done = 0;
            while done < run.rows {
                let own = (run.rows - done).min(ROWS_MAX - rows);
                part.push(SlotRun { slot: run.slot, first: run.first + done, rows: own });
                (done, rows) = (done + own, rows + own);
                if rows == ROWS_MAX {
                    self.slab.compute_in(&self.peer, layer, &std::mem::take(&mut part))?;
                    rows = 0;
                }
            }
        }
        match part.is_empty() {
            true => Ok(()),
            false => Ok(self.slab.compute_in(&self.peer, layer, &part)?),
        }
    }
}

impl Work {
    fn new(gpu: &Gpu, shape: &ExpertShape) -> Result<Self, CudaError> {
        let packet = Tiles::bytes_max(ROWS_MAX) + shape.dtype.bytes(ROWS_MAX * shape.d_model);
        let order: Vec<u32> = (0..ROWS_MAX as u32).collect();
        Ok(Self {
            packet: gpu.allocate("activations", packet)?,
            hidden: gpu.allocate("activations", shape.dtype.bytes(ROWS_MAX * shape.d_ff))?,
            out: gpu.allocate("activations", ROWS_MAX * shape.d_model)?,
            order: gpu.allocate_with("activations", &order)?,
            staging: gpu.pinned(packet.max(ROWS_MAX * shape.d_model * 4))?,
        })
    }
}
