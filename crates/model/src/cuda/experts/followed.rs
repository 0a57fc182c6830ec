//! Experts beside a pass that is followed layer by layer: each layer's come just before it is started, in the place of what is used
//! later, and what a layer is done with may leave while the next one runs.

use std::ops::Range;

use sida_routing::{ExpertKey, LayerId, PlanId, residency::Room};

use super::{BUSY_UPLOADS, Experts, NEXT_PLANS, Plans, is_planned};
use crate::cuda::{device::Gpu, error::CudaError, host_tier::HostTier};

/// Uploads on their way beside a pass: enough for the time of a layer, for the later one is begun, the better is known who
/// can leave for it.
const BESIDE_MAX: usize = 4;
impl Experts {
    /// Whether the pass that follows, through these layers, would wait for experts that `current` plans longer than it is worth to
    /// start it at once.
    pub(in crate::cuda) fn is_behind(
        &mut self,
        current: Option<PlanId>,
        layers: &Range<u16>,
    ) -> Result<bool, CudaError> {
        if self.residency.next_missing_within(1).is_some_and(|key| layers.contains(&key.layer.0)) {
            return Ok(true);
        }
        let mut waits = 0;
        for load in self.ahead.iter().filter(|load| is_planned(&self.plans, current, load.key)) {
            waits += usize::from(!self.uploads.is_done(load.slot.index())?);
        }
        Ok(waits >= BUSY_UPLOADS)
    }

    /// Before `layer` of a pass that is followed is started: has the compute stream wait for what `current` plans of it, begins
    /// what is to come, and brings its part of the table up to date. The layers `running` were started. Returns how many uploads
    /// were begun.
    pub(in crate::cuda) fn come_to(
        &mut self,
        gpu: &Gpu,
        host: &mut HostTier,
        current: Option<PlanId>,
        layer: LayerId,
        running: Range<u16>,
    ) -> Result<usize, CudaError> {
        self.residency.hold(running);
        let begun =
            self.prefetch_beside(gpu, host, |plans, key| key.layer == layer && is_planned(plans, current, key))?;
        for load in std::mem::take(&mut self.ahead) {
            let is_wanted = is_planned(&self.plans, current, load.key);
            if load.key.layer == layer && (is_wanted || self.uploads.is_done(load.slot.index())?) {
                self.enter_awaited(load);
            } else {
                self.ahead.push(load);
            }
        }
        let only = layer.0..layer.0 + 1;
        self.settle(gpu, only.clone())?;
        self.send_table(gpu, only)?;
        Ok(begun)
    }

    /// No layer of a pass that was followed runs any more. Returns how many uploads were begun.
    pub(in crate::cuda) fn go_on(&mut self, gpu: &Gpu, host: &mut HostTier) -> Result<usize, CudaError> {
        self.residency.hold(0..0);
        self.prefetch_beside(gpu, host, |_, _| false)
    }

    /// Begins what is planned, in the order of use: a few, and all that `is_now` says is used now.
    fn prefetch_beside(
        &mut self,
        gpu: &Gpu,
        host: &mut HostTier,
        is_now: impl Fn(&Plans, ExpertKey) -> bool,
    ) -> Result<usize, CudaError> {
        let before = self.on_the_way()?;
        let mut begun = 0;
        while let Some(key) = self.residency.next_missing_within(NEXT_PLANS)
            && (before + begun < BESIDE_MAX || is_now(&self.plans, key))
            && let Some(load) = self.residency.next_prefetch_within(NEXT_PLANS, Room::UsedAfterLayer)
        {
            self.begin_ahead(gpu, host, &load)?;
            self.ahead.push(load);
            begun += 1;
        }
        Ok(begun)
    }

    /// Uploads for later that are not yet there.
    fn on_the_way(&self) -> Result<usize, CudaError> {
        let mut count = 0;
        // They end in the order in which they were begun.
        for load in self.ahead.iter().rev() {
            if self.uploads.is_done(load.slot.index())? {
                break;
            }
            count += 1;
        }
        Ok(count)
    }
}
