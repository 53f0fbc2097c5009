//! Flat buffers of parameters, gradients and statistics: f32 masters, and the working copy that convolutions read.

use crate::device::Device;
use crate::device::cudarc::driver::{CudaSlice, CudaStream, CudaView, CudaViewMut, DevicePtr};
use crate::kernels::RawElement;
use crate::kernels::input::InputElement;
use crate::kernels::optimizer::{CopyElement, Optimizer, WorkingCopy};
use crate::{Error, Result};
use half::{bf16, f16};
use std::collections::HashMap;
use std::fmt::Debug;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// A flat buffer in f32. One that convolutions read has a copy in their element type as well, made when it is first read,
/// kept by the optimizer and made anew after other changes; one that inference reads has its kernels folded, likewise.
#[derive(Debug)]
pub struct Buffer<T> {
    /// None where there are no values.
    pub(super) values: Option<CudaSlice<f32>>,
    /// Another one after every change.
    version: Version,
    copy: Option<CudaSlice<T>>,
    /// That of the values in the copy.
    copied: Option<Version>,
    folded: Folds<T>,
}

/// Tells apart the states of all buffers of a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Version(u64);

impl Version {
    fn next() -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        Self(NEXT.fetch_add(1, Ordering::Relaxed))
    }
}

/// Convolutions with their batch norms in them.
#[derive(Debug)]
struct Folds<T> {
    /// By where their weights begin.
    layers: HashMap<usize, Fold<T>>,
    /// Of the parameters and statistics that they were made of.
    versions: Option<[Version; 2]>,
}

/// The weights of a convolution times the scale of its batch norm, and its norm, \[4, c\]; the shift is the bias.
#[derive(Debug)]
pub(super) struct Fold<T> {
    pub(super) weights: CudaSlice<T>,
    pub(super) norm: CudaSlice<f32>,
}

impl<T: FusedElement> Buffer<T> {
    fn new(values: Option<CudaSlice<f32>>) -> Self {
        let folded = Folds { layers: HashMap::new(), versions: None };
        Self { values, version: Version::next(), copy: None, copied: None, folded }
    }

    /// Holding `values`.
    pub(super) fn upload(device: &Device, values: &[f32]) -> Result<Self> {
        Ok(Self::new(if values.is_empty() { None } else { Some(device.upload(values)?) }))
    }

    /// Holding zeros.
    pub(super) fn zeros(device: &Device, length: usize) -> Result<Self> {
        Ok(Self::new(if length == 0 { None } else { Some(device.zeros(length)?) }))
    }

    /// How many values it has.
    pub fn len(&self) -> usize {
        self.values.as_ref().map_or(0, CudaSlice::len)
    }

    /// Whether it has none.
    pub fn is_empty(&self) -> bool {
        self.values.is_none()
    }

    /// Where its values and its copy lie; 0 for what is not there.
    pub(super) fn addresses(&self, stream: &Arc<CudaStream>) -> [u64; 2] {
        let values = self.values.as_ref().map_or(0, |values| values.device_ptr(stream).0);
        [values, self.copy.as_ref().map_or(0, |copy| copy.device_ptr(stream).0)]
    }

    /// The values at `range`, in f32.
    pub(super) fn part(&self, range: &Range<usize>) -> Result<CudaView<'_, f32>> {
        self.values
            .as_ref()
            .and_then(|values| values.try_slice(range.clone()))
            .ok_or_else(|| outside(range, self.len()))
    }

    /// The values at `range` as convolutions read them. [`refresh`](Self::refresh) comes first.
    pub(super) fn working(&self, range: &Range<usize>) -> Result<CudaView<'_, T>> {
        T::working(self, range)
    }

    /// All values, to be read.
    pub(super) fn all(&self) -> Result<CudaView<'_, f32>> {
        self.part(&(0..self.len().max(1)))
    }

    /// All values, to be written. What was made of them is out of date then.
    pub(super) fn all_mut(&mut self) -> Result<CudaViewMut<'_, f32>> {
        self.touch();
        self.values.as_mut().map(CudaSlice::as_view_mut).ok_or_else(|| outside(&(0..1), 0))
    }

    /// The values have been changed without the copy.
    pub(super) fn touch(&mut self) {
        self.version = Version::next();
    }

    /// The values have been changed and the copy with them.
    pub(super) fn touch_with_copy(&mut self) {
        self.touch();
        self.copied = self.copy.as_ref().map(|_| self.version);
    }

    /// The values to be written, and the copy to go with them.
    pub(super) fn masters_and_copy(&mut self) -> Result<(CudaViewMut<'_, f32>, Option<CudaViewMut<'_, T>>)> {
        self.touch_with_copy();
        let length = self.len();
        let Self { values, copy, .. } = self;
        let values = values.as_mut().ok_or_else(|| outside(&(0..1), length))?;
        Ok((values.as_view_mut(), copy.as_mut().map(CudaSlice::as_view_mut)))
    }

    /// Whether there should be a copy and it is missing or out of date.
    pub(super) fn is_stale(&self) -> bool {
        T::HAS_COPY && self.values.is_some() && self.copied != Some(self.version)
    }

    /// Brings the copy up to date.
    pub(super) fn refresh(&mut self, device: &Device, caster: &Optimizer) -> Result<()> {
        T::refresh(self, device, caster)?;
        self.copied = Some(self.version);
        Ok(())
    }

    /// The convolution whose weights begin at `start`, folded; `make` makes it of the parameters, unless it has been made
    /// of these and of the statistics `stats`.
    pub(super) fn folded(
        &mut self,
        start: usize,
        stats: &Self,
        make: impl FnOnce(&Self) -> Result<Fold<T>>,
    ) -> Result<&Fold<T>> {
        let versions = Some([self.version, stats.version]);
        if self.folded.versions != versions {
            self.folded = Folds { layers: HashMap::new(), versions };
        }
        if !self.folded.layers.contains_key(&start) {
            let fold = make(self)?;
            self.folded.layers.insert(start, fold);
        }
        self.folded.layers.get(&start).ok_or_else(|| outside(&(start..start), 0))
    }
}

fn outside(range: &Range<usize>, length: usize) -> Error {
    let problem = format!("{range:?} is not within a buffer of {length} values");
    Error::Shape { operation: "flat buffer", problem }
}

/// An element type of activations and of what convolutions read.
pub trait FusedElement: RawElement + InputElement + Debug {
    /// Whether convolutions read a copy of the weights.
    const HAS_COPY: bool = true;

    /// From f32, rounded to nearest.
    fn narrow(value: f32) -> Self;

    /// To f32.
    fn wide(self) -> f32;

    #[doc(hidden)]
    fn working<'a>(buffer: &'a Buffer<Self>, range: &Range<usize>) -> Result<CudaView<'a, Self>>;

    #[doc(hidden)]
    fn refresh(buffer: &mut Buffer<Self>, device: &Device, caster: &Optimizer) -> Result<()>;

    #[doc(hidden)]
    fn working_copy<'a, 'b>(copy: Option<&'a mut CudaViewMut<'b, Self>>) -> WorkingCopy<'a, 'b>;
}

impl FusedElement for f32 {
    const HAS_COPY: bool = false;

    fn narrow(value: f32) -> Self {
        value
    }

    fn wide(self) -> f32 {
        self
    }

    fn working<'a>(buffer: &'a Buffer<Self>, range: &Range<usize>) -> Result<CudaView<'a, Self>> {
        buffer.part(range)
    }

    fn refresh(_: &mut Buffer<Self>, _: &Device, _: &Optimizer) -> Result<()> {
        Ok(())
    }

    fn working_copy<'a, 'b>(_: Option<&'a mut CudaViewMut<'b, Self>>) -> WorkingCopy<'a, 'b> {
        WorkingCopy::None
    }
}

/// The values at `range` of the copy.
fn copied<'a, T: FusedElement>(buffer: &'a Buffer<T>, range: &Range<usize>) -> Result<CudaView<'a, T>> {
    let copy = buffer.copy.as_ref().filter(|_| !buffer.is_stale()).ok_or_else(|| Error::Shape {
        operation: "flat buffer",
        problem: "its working copy is out of date".into(),
    })?;
    copy.try_slice(range.clone()).ok_or_else(|| outside(range, copy.len()))
}

fn cast<T: FusedElement + CopyElement>(
    buffer: &mut Buffer<T>,
    device: &Device,
    caster: &Optimizer,
) -> Result<()> {
    let length = buffer.len();
    let Buffer { values: Some(values), copy, .. } = buffer else { return Ok(()) };
    if copy.is_none() {
        *copy = Some(device.zeros(length)?);
    }
    let Some(copy) = copy else { return Ok(()) };
    caster.cast(device.compute(), &values.as_view(), &mut copy.as_view_mut())
}

impl FusedElement for f16 {
    fn narrow(value: f32) -> Self {
        Self::from_f32(value)
    }

    fn wide(self) -> f32 {
        self.to_f32()
    }

    fn working<'a>(buffer: &'a Buffer<Self>, range: &Range<usize>) -> Result<CudaView<'a, Self>> {
        copied(buffer, range)
    }

    fn refresh(buffer: &mut Buffer<Self>, device: &Device, caster: &Optimizer) -> Result<()> {
        cast(buffer, device, caster)
    }

    fn working_copy<'a, 'b>(copy: Option<&'a mut CudaViewMut<'b, Self>>) -> WorkingCopy<'a, 'b> {
        copy.map_or(WorkingCopy::None, WorkingCopy::F16)
    }
}

impl FusedElement for bf16 {
    fn narrow(value: f32) -> Self {
        Self::from_f32(value)
    }

    fn wide(self) -> f32 {
        self.to_f32()
    }

    fn working<'a>(buffer: &'a Buffer<Self>, range: &Range<usize>) -> Result<CudaView<'a, Self>> {
        copied(buffer, range)
    }

    fn refresh(buffer: &mut Buffer<Self>, device: &Device, caster: &Optimizer) -> Result<()> {
        cast(buffer, device, caster)
    }

    fn working_copy<'a, 'b>(copy: Option<&'a mut CudaViewMut<'b, Self>>) -> WorkingCopy<'a, 'b> {
        copy.map_or(WorkingCopy::None, WorkingCopy::Bf16)
    }
}
