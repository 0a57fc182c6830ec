//! The rows of an MoE layer on their way to the experts and back: brought to the host and added from there, grouped for
//! experts on the same device, or left for nodes of other processes to read, whose results are taken over.

use sida_routing::Grouping;

use super::{
    super::{
        arguments::Take,
        error::CudaError,
        grouped::{Grouped, Slots, Tiles},
        kernels::Kernels,
        weights,
        window::{Mapped, SharedRows},
    },
    DeviceDense,
};
use crate::{ModelError, SlotRun};

impl DeviceDense {
    /// The rows of that layer, x (rows, d_model): for experts that are elsewhere.
    pub(crate) fn fetch(&mut self) -> Result<Vec<f32>, CudaError> {
        self.gpu.enter()?;
        let bytes = self.current.shape.rows * self.config.d_model * self.precision.size();
        let host = self.exchange.host()?;
        // SAFETY: as in `choice`.
        unsafe { self.gpu.start_reading(self.scratch.x.address(), &mut host[..bytes]) }?;
        self.gpu.finish()?;
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
        self.gpu.write(self.scratch.order.address(), weights::plain_bytes(&grouping.tokens))?;
        self.gpu.write(self.scratch.alpha.address(), weights::plain_bytes(&alpha))?;
        self.gpu.clear(self.exchange.added.address(), rows * self.config.d_model * 4)
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
        self.gpu.write(exchange.places.address(), weights::plain_bytes(places))?;
        let take = Take {
            results: from.map_or(0, Mapped::address),
            places: exchange.places.address(),
            order: self.scratch.order.address(),
            alpha: self.scratch.alpha.address(),
            out: exchange.added.address(),
            d: self.config.d_model as i32,
        };
        self.gpu.launch(&self.kernels.take_rows, (places.len(), 1, 1), 128, &take)
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

    /// Starts the experts in slots of `slab` on their rows.
    pub(in crate::cuda) fn start_experts(
        &self,
        kernels: &Kernels,
        slots: Slots,
        runs: &[SlotRun],
    ) -> Result<(), CudaError> {
        self.gpu.enter()?;
        let exchange = &self.exchange;
        let tiles = Tiles::of(kernels, runs);
        let packet = tiles.packet();
        self.gpu.write(exchange.tiles.address(), &packet)?;
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
        grouped.start(tiles.few.len(), tiles.many.len())
    }

    /// h += out (rows, d_model).
    pub(crate) fn add_rows(&mut self, out: &[f32]) -> Result<(), CudaError> {
        let expected = self.current.shape.rows * self.config.d_model;
        if out.len() != expected {
            let (expected, found) = (vec![expected], vec![out.len()]);
            return Err(ModelError::Shape { what: "results of experts [values]", expected, found }.into());
        }
        self.gpu.enter()?;
        let bytes = weights::plain_bytes(out);
        // Nothing is on its way: the router's choice was waited for.
        let added = self.exchange.added.address();
        let host = self.exchange.host()?;
        host[..bytes.len()].copy_from_slice(bytes);
        let host = &host[..bytes.len()];
        // SAFETY: `host` is written again only after the device was waited for, by `choice`; the stream orders `added`.
        unsafe { self.gpu.upload(&self.gpu.compute, host, added) }?;
        self.pass().add(added)
    }
}
