//! The rows of an MoE layer on their way to the experts and back: brought to the host and added from there, grouped for
//! experts on the same device, or left for nodes of other processes to read, whose results are taken over.

use bytemuck::cast_slice;
use sida_routing::Grouping;

use super::{
    super::{
        arguments::Take,
        error::{CudaError, failed},
        grouped::{Grouped, Slots, Tiles},
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

    /// Tells the device which token is at each place of the grouped rows, and the factor of each token's expert. What
    /// experts on the device make of them is summed from 0; then comes [`DeviceDense::add_computed`].
    pub(crate) fn group(&mut self, grouping: &Grouping) -> Result<(), CudaError> {
        let rows = self.current.shape.rows;
        let mut alpha = vec![0.0; rows];
        for (&token, &weight) in grouping.tokens.iter().zip(&grouping.weights) {
            alpha[token as usize] = weight;
        }
        self.gpu.enter()?;
        self.gpu.write(self.scratch.order.all(), &grouping.tokens)?;
        self.gpu.write(self.scratch.alpha.all(), &alpha)?;
        self.gpu.fill(self.exchange.added.first(rows * self.config.d_model), 0)
    }

    /// Waits until what others on this machine read is there: the rows, and how they are grouped.
    pub(crate) fn settle(&mut self) -> Result<(), CudaError> {
        self.gpu.enter()?;
        self.gpu.finish()
    }

    /// Starts taking over what experts of another process made of the rows at these places, each times its factor; or
    /// nothing, as if they had not been computed.
    pub(crate) fn take(&mut self, from: Option<&Mapped>, places: &[u32]) -> Result<(), CudaError> {
        self.gpu.enter()?;
        let exchange = &self.exchange;
        self.gpu.write(exchange.places.all(), places)?;
        let take = Take {
            results: from.map_or(0, Mapped::address),
            places: exchange.places.address(),
            order: self.scratch.order.address(),
            alpha: self.scratch.alpha.address(),
            out: exchange.added.address(),
            d: self.config.d_model as i32,
        };
        // SAFETY: places are below the rows of this pass, for each of which there is a factor, a token and a result.
        unsafe { self.gpu.launch(&self.kernels.take_rows, (places.len(), 1, 1), 128, &take) }
    }

    /// What rows and grouping are in, to be shared.
    pub(crate) fn shared_rows(&self) -> Result<SharedRows, CudaError> {
        SharedRows::new(&self.scratch.shared, self.scratch.layout, self.config.d_model, self.precision)
    }

    /// h += what experts on the device made of the rows.
    pub(crate) fn add_computed(&mut self) -> Result<(), CudaError> {
        self.gpu.enter()?;
        self.pass().add(self.exchange.added.address())
    }

    /// Starts the experts in slots of a slab on their rows.
    ///
    /// # Safety
    /// The runs are of rows of this pass, and of slots whose experts are there and stay until the compute stream is done.
    pub(in crate::cuda) unsafe fn start_experts(
        &self,
        kernels: &Kernels,
        slots: Slots,
        runs: &[SlotRun],
    ) -> Result<(), CudaError> {
        self.gpu.enter()?;
        let exchange = &self.exchange;
        let tiles = Tiles::of(kernels, runs);
        let packet = tiles.packet();
        self.gpu.write(exchange.tiles.all(), &packet)?;
        let (counts, few, many) = tiles.addresses(exchange.tiles.address());
        let grouped = Grouped {
            gpu: &self.gpu,
            kernels,
            rows: self.current.shape.rows,
            d_model: self.config.d_model,
            d_ff: self.config.d_ff,
            x: self.scratch.x.address(),
            hidden: self.scratch.hidden.address(),
            out: exchange.added.address(),
            order: self.scratch.order.address(),
            alpha: self.scratch.alpha.address(),
            slots,
            few,
            many,
            counts,
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
        let Exchange { host, added, .. } = &mut self.exchange;
        let host = &mut host.as_mut_slice().map_err(failed("cuEventSynchronize"))?[..size_of_val(out)];
        host.copy_from_slice(cast_slice(out));
        // SAFETY: `host` is written again only after the device was waited for, by `choice`; the stream orders `added`.
        unsafe { self.gpu.upload(&self.gpu.compute, host, added.first(out.len()).as_bytes()) }?;
        self.pass().add(self.exchange.added.address())
    }
}
