//! The rows of an MoE layer on their way to the experts and back: brought to the host and added from there, grouped for
//! experts on the same device, or left for nodes of other processes to read, whose results are taken over.

use bytemuck::cast_slice;
use sida_routing::{Grouping, LayerId};

use super::{
    super::{
        arguments::Take,
        error::{CudaError, failed},
        grouped::{Grouped, Results, Slots, Tiles},
        kernels::Kernels,
        window::{Mapped, SharedRows},
    },
    DeviceDense, Exchange,
};
use crate::{ModelError, SlotRun};

impl DeviceDense {
    /// The rows of that layer, x (rows, d_model): for experts that are elsewhere.
    pub(crate) fn fetch(&mut self) -> Result<Vec<f32>, CudaError> {
        self.gpu.enter()?;
        let bytes = self.current.shape.rows * self.config.d_model * self.precision.size();
        let host = self.exchange.host()?;
        self.gpu.read(self.scratch.x.all(), &mut host[..bytes])?;
        Ok(self.precision.stored().widen(&host[..bytes]))
    }

    /// Tells the device which token is at each place of the grouped rows, which of its choices that is, and the factor of
    /// each. What experts make of a choice is 0 until one has; then comes [`DeviceDense::add_computed`].
    pub(crate) fn group(&mut self, grouping: &Grouping) -> Result<(), CudaError> {
        let (rows, top_k) = (self.current.shape.rows, self.config.top_k);
        let (mut choices_of, mut alpha) = (vec![0; rows], vec![0.0; rows * top_k]);
        // Places ascend by expert, and so do the choices of a token: they are added in that order, as the processor adds.
        let choice = |(&token, &weight): (&u32, &f32)| {
            let of_token: &mut u32 = &mut choices_of[token as usize];
            let choice = token * top_k as u32 + *of_token;
            *of_token += 1;
            alpha[choice as usize] = weight;
            choice
        };
        let to: Vec<u32> = grouping.tokens.iter().zip(&grouping.weights).map(choice).collect();
        self.gpu.enter()?;
        self.gpu.write(self.scratch.order.all(), &grouping.tokens)?;
        self.gpu.write(self.scratch.to.all(), &to)?;
        self.gpu.write(self.scratch.alpha.all(), &alpha)?;
        self.gpu.fill(self.scratch.each.first(rows * top_k * self.config.d_model), 0)
    }

    /// Waits until what others on this machine read is there: the rows, and how they are grouped.
    pub(crate) fn settle(&mut self) -> Result<(), CudaError> {
        self.gpu.enter()?;
        self.gpu.finish()
    }

    /// Starts taking over what experts of another process made of the rows at these places; or nothing, as if they had not
    /// been computed.
    pub(crate) fn take(&mut self, from: Option<&Mapped>, places: &[u32]) -> Result<(), CudaError> {
        self.gpu.enter()?;
        self.gpu.write(self.exchange.places.all(), places)?;
        self.start_taking(from.map_or(0, Mapped::address), 0, places.len(), false)
    }

    /// Adds what experts elsewhere made of all places, (places, d_model), to what those of devices made of them: each place
    /// is 0 on one side.
    pub(crate) fn put(&mut self, results: &[f32]) -> Result<(), CudaError> {
        self.gpu.enter()?;
        let (d_model, rows) = (self.config.d_model, self.scratch.rows_max);
        for (piece, results) in results.chunks(rows * d_model).enumerate() {
            let (first, count) = (piece * rows, results.len() / d_model);
            let places: Vec<u32> = (first..first + count).map(|place| place as u32).collect();
            self.gpu.write(self.exchange.places.all(), &places)?;
            self.upload(results)?;
            self.start_taking(self.exchange.added.address(), first, count, true)?;
            // The page-locked memory is written again.
            self.gpu.finish()?;
        }
        Ok(())
    }

    /// Starts taking results, which begin with those of place `first`, of so many places that were sent.
    fn start_taking(&self, results: u64, first: usize, places: usize, adds: bool) -> Result<(), CudaError> {
        let take = Take {
            results,
            places: self.exchange.places.address(),
            to: self.scratch.to.address(),
            out: self.scratch.each.address(),
            d: self.config.d_model as i32,
            first: first as i32,
            adds: i32::from(adds),
        };
        // SAFETY: places are below the choices of this pass, for each of which there is room, and a result.
        unsafe { self.gpu.launch(&self.kernels.take_rows, (places, 1, 1), 128, &take) }
    }

    /// What rows and grouping are in, to be shared.
    pub(crate) fn shared_rows(&self) -> Result<SharedRows, CudaError> {
        SharedRows::new(&self.scratch.shared, self.scratch.layout, self.config.d_model, self.precision)
    }

    /// h += the sum of what experts made of each row's choices, each times its factor.
    pub(crate) fn add_computed(&mut self) -> Result<(), CudaError> {
        self.gpu.enter()?;
        self.pass().combine(0, None)
    }

    /// Starts the experts of a layer in slots of a slab on their rows.
    ///
    /// # Safety
    /// The runs are of rows of this pass, and of slots whose experts are there and stay until the compute stream is done.
    pub(in crate::cuda) unsafe fn start_experts(
        &self,
        kernels: &Kernels,
        slots: &Slots,
        layer: LayerId,
        runs: &[SlotRun],
    ) -> Result<(), CudaError> {
        self.gpu.enter()?;
        let exchange = &self.exchange;
        let tiles = Tiles::of(kernels, slots, runs);
        let packet = tiles.packet();
        self.gpu.write(exchange.tiles.all(), &packet)?;
        let (counts, few, many) = tiles.addresses(exchange.tiles.address());
        let grouped = Grouped {
            gpu: &self.gpu,
            kernels,
            d_model: self.config.d_model,
            d_ff: self.config.d_ff,
            x: self.scratch.x.address(),
            hidden: self.scratch.hidden.address(),
            out: self.scratch.each.address(),
            results: Results::Each,
            order: self.scratch.order.address(),
            to: self.scratch.to.address(),
            slots: slots.of(layer),
            few,
            many,
            counts,
            others: tiles.others,
            layers: 0,
            guard: 0,
        };
        // SAFETY: the memory is the model's, as large as its largest batch; the rest by the caller's promise.
        unsafe { grouped.start(tiles.few.len(), tiles.many.len()) }
    }

    /// h += out (rows, d_model).
    pub(crate) fn add_rows(&mut self, out: &[f32]) -> Result<(), CudaError> {
        let expected = self.current.shape.rows * self.config.d_model;
        if out.len() != expected {
            let (expected, found) = (vec![expected], vec![out.len()]);
            return Err(ModelError::Shape { what: "results of experts [values]", expected, found }.into());
        }
        self.gpu.enter()?;
        // Nothing is on its way: the router's choice was waited for.
        self.upload(out)?;
        self.pass().add(self.exchange.added.address())
    }

    /// Starts bringing values to the device, through page-locked memory from which nothing may be on its way.
    fn upload(&mut self, values: &[f32]) -> Result<(), CudaError> {
        let Exchange { host, added, .. } = &mut self.exchange;
        let host = &mut host.as_mut_slice().map_err(failed("cuEventSynchronize"))?[..size_of_val(values)];
        host.copy_from_slice(cast_slice(values));
        // SAFETY: `host` is written again only after the device was waited for; the stream orders `added`.
        unsafe { self.gpu.upload(&self.gpu.compute, host, added.first(values.len()).as_bytes()) }
    }
}
