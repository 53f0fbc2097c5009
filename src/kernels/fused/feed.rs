//! What reaches a pass from outside: images on their way, how they are mixed, targets, the key of random numbers. All of it
//! lies in buffers that stay where they are, so that a recorded pass finds it there.

use super::FusedElement;
use super::plans::Cache;
use crate::backend::{DropPath, Normalisation, StepKey};
use crate::data::MixPlan;
use crate::device::cudarc::driver::{CudaSlice, CudaView, CudaViewMut};
use crate::device::{self, Device, Staging};
use crate::kernels::StepScalars;
use crate::kernels::batch_norm::StochasticDepth;
use crate::kernels::input::Input;
use crate::{Error, Result};
use std::collections::VecDeque;

const CHANNELS: usize = 3;

/// Batches of one number of images and side.
#[derive(Debug)]
struct Images<T> {
    staging: Staging<u8>,
    landed: CudaSlice<u8>,
    input: Option<(Normalisation, Input<T>)>,
}

/// The random numbers of a step of so many images.
#[derive(Debug)]
struct Step {
    scalars: StepScalars,
    depth: Option<StochasticDepth>,
}

/// Images and side of a batch.
type BatchKey = (usize, usize);

#[derive(Debug)]
pub(super) struct Feeds<T> {
    images: Cache<BatchKey, Images<T>>,
    sent: VecDeque<BatchKey>,
    begun: Option<BatchKey>,
    targets: Cache<usize, CudaSlice<f32>>,
    targets_given: usize,
    steps: Cache<usize, Step>,
    drops: Vec<DropPath>,
}

impl<T> Default for Feeds<T> {
    fn default() -> Self {
        Self {
            images: Cache::default(),
            sent: VecDeque::new(),
            begun: None,
            targets: Cache::default(),
            targets_given: 0,
            steps: Cache::default(),
            drops: Vec::new(),
        }
    }
}

impl<T: FusedElement> Feeds<T> {
    /// Adds to the blocks whose branches are dropped. Whether that changes anything.
    pub(super) fn add_drops(&mut self, drops: &[DropPath]) -> bool {
        let known = self.drops.len();
        for drop in drops {
            if !self.drops.contains(drop) {
                self.drops.push(*drop);
            }
        }
        let changed = self.drops.len() > known;
        if changed {
            self.steps = Cache::default();
        }
        changed
    }

    pub(super) fn send(&mut self, device: &Device, images: &[u8], side: usize) -> Result<()> {
        let count = images.len() / (side * side * CHANNELS).max(1);
        if count == 0 || images.len() != count * side * side * CHANNELS {
            let problem = format!("{} bytes are no images of {side}×{side} pixels", images.len());
            return Err(Error::Shape { operation: "input", problem });
        }
        if self.sent.len() == 2 {
            let problem = "two batches are on their way: begin a pass before sending a third".into();
            return Err(Error::Shape { operation: "input", problem });
        }
        let key = (count, side);
        let feed = self.images.get(key, || {
            let (staging, landed) = (Staging::new(device, images.len())?, device.zeros(images.len())?);
            Ok(Images { staging, landed, input: None })
        })?;
        feed.staging.send(|pinned| {
            pinned.copy_from_slice(images);
            Ok(())
        })?;
        self.sent.push_back(key);
        Ok(())
    }

    pub(super) fn discard_sent(&mut self) {
        for key in self.sent.drain(..) {
            if let Some(feed) = self.images.existing_mut(&key) {
                feed.staging.discard();
            }
        }
    }

    pub(super) fn begin_pass(
        &mut self,
        device: &Device,
        normalisation: &Normalisation,
        mix: &MixPlan,
    ) -> Result<()> {
        let key = *self.sent.front().ok_or_else(|| Error::Shape {
            operation: "input",
            problem: "no batch is on its way: send one first".into(),
        })?;
        let (count, side) = key;
        let Some(feed) = self.images.existing_mut(&key) else { return Err(no_pass()) };
        if feed.input.as_ref().is_none_or(|(known, _)| known != normalisation) {
            feed.input = Some((*normalisation, Input::plan(device, count, side, normalisation)?));
        }
        let Some((_, input)) = &mut feed.input else { return Err(no_pass()) };
        input.begin_step(device.compute(), mix, None)?;
        self.sent.pop_front();
        feed.staging.receive(&mut feed.landed.as_view_mut())?;
        self.begun = Some(key);
        Ok(())
    }

    /// Images and side of the pass that was begun.
    pub(super) fn begun(&self) -> Result<BatchKey> {
        self.begun.ok_or_else(no_pass)
    }

    /// y ← the images of the pass, normalised and mixed.
    pub(super) fn input(&mut self, device: &Device, y: &mut CudaViewMut<'_, T>) -> Result<()> {
        let key = self.begun.take().ok_or_else(no_pass)?;
        let feed = self.images.existing_mut(&key).ok_or_else(no_pass)?;
        let Some((_, input)) = &feed.input else { return Err(no_pass()) };
        input.forward(device.compute(), &feed.landed.as_view(), y)
    }

    /// The pass was computed by other means.
    pub(super) fn pass_done(&mut self) {
        self.begun = None;
    }

    pub(super) fn set_targets(&mut self, device: &Device, targets: &[f32]) -> Result<()> {
        let buffer = self.targets.get(targets.len(), || device.zeros(targets.len()))?;
        device::write(device.compute(), targets, buffer)?;
        self.targets_given = targets.len();
        Ok(())
    }

    pub(super) fn begin_step(&mut self, device: &Device, key: &StepKey, loss_scale: f64) -> Result<()> {
        let step = step(&mut self.steps, &self.drops, device, key.images.len())?;
        step.scalars.begin_step(device.compute(), key, loss_scale)?;
        match &mut step.depth {
            Some(depth) => depth.draw(device.compute(), &step.scalars),
            None => Ok(()),
        }
    }

    /// What kernels read of a step of so many images.
    pub(super) fn scalars(&mut self, device: &Device, images: usize) -> Result<&StepScalars> {
        Ok(&step(&mut self.steps, &self.drops, device, images)?.scalars)
    }

    /// The same, and the targets of the pass, of which there must be `count`.
    pub(super) fn scalars_and_targets(
        &mut self,
        device: &Device,
        images: usize,
        count: usize,
    ) -> Result<(&StepScalars, CudaView<'_, f32>)> {
        let Self { steps, drops, targets, targets_given, .. } = self;
        let scalars = &step(steps, drops, device, images)?.scalars;
        match targets.existing(&count) {
            Some(buffer) if *targets_given == count => Ok((scalars, buffer.as_view())),
            _ => {
                let problem = format!("{targets_given} targets do not match {count} logits");
                Err(Error::Shape { operation: "cross entropy", problem })
            }
        }
    }

    /// The factors of one block, \[images\].
    pub(super) fn factors(&self, drop: DropPath, images: usize) -> Result<CudaView<'_, f32>> {
        let depth = self.steps.existing(&images).and_then(|step| step.depth.as_ref());
        match (depth, self.drops.iter().position(|known| *known == drop)) {
            (Some(depth), Some(number)) => Ok(depth.factors(number)),
            _ => {
                let problem = format!("no step of {images} images was begun that drops {drop:?}");
                Err(Error::Shape { operation: "stochastic depth", problem })
            }
        }
    }
}

fn step<'a>(
    steps: &'a mut Cache<usize, Step>,
    drops: &[DropPath],
    device: &Device,
    images: usize,
) -> Result<&'a mut Step> {
    steps.get(images, || {
        let depth = match drops {
            [] => None,
            drops => Some(StochasticDepth::plan(device, images, drops)?),
        };
        Ok(Step { scalars: StepScalars::new(device, images)?, depth })
    })
}

fn no_pass() -> Error {
    Error::Shape { operation: "input", problem: "no pass was begun, or its input was taken already".into() }
}
