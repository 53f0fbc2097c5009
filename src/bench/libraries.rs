//! Single convolutions, ours beside those of cuBLASLt and cuDNN.
//!
//! What is compared is bare: no normalisation, activation or gate on load, no moments on store. Ours still pays, on load,
//! the batch norm's backward that no library knows, for there are no kernels without it; it reads the raw output for
//! that, and a gradient then moves up to half as many bytes again. So a ratio of 1 means that everything else that our
//! kernels do in a network is won.
//!
//! Both sides work on the same buffers, of which there are as many as it takes that the last cache holds none when its
//! turn comes, and each round of one is followed by one of the other. On a GPU the launches of a round are a CUDA graph,
//! so that no side waits for its calls. Before anything is timed the results are compared.

use super::agreement::{bound, difference, random, values};
use super::noise;
use super::timing::{Effort, Milliseconds, alternate};
use crate::device::cudarc::driver::CudaSlice;
use crate::device::{Device, Graph};
use crate::kernels::conv3x3::Conv3x3;
use crate::kernels::depthwise::Depthwise;
use crate::kernels::fused::FusedElement;
use crate::kernels::pointwise::Pointwise;
use crate::kernels::tuning::Choices;
use crate::kernels::{Arrival, GradientOutput, GradientView, Input, Output, Workspace};
use crate::nn::{BlockKind, NetworkSpec};
use crate::peers::{Direction, Libraries, Operation, Tensors};
use crate::tensor::{Conv, ConvKind, Dtype, Padding, Shape};
use crate::{Error, Result};
use serde::{Deserialize, Serialize};
use std::cell::RefCell;
use std::rc::Rc;
use std::time::{Duration, Instant};

/// A convolution of a network.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layer {
    /// With symmetric padding, the only one that cuDNN knows.
    pub conv: Conv,
    /// Its input.
    pub x: Shape,
    /// How often a forward has it.
    pub calls: usize,
}

/// The distinct convolutions of `network` on `batch` images of `size` pixels in forward order, but for the stem.
pub fn layers(network: &NetworkSpec, size: usize, batch: usize) -> Vec<Layer> {
    let mut found: Vec<Layer> = Vec::new();
    let mut add = |kind, kernel, stride, inputs, outputs, side| {
        let conv = Conv { kind, kernel, stride, padding: Padding::Symmetric, inputs, outputs };
        let x = Shape::new(batch, side, side, inputs);
        match found.iter_mut().find(|layer| (layer.conv, layer.x) == (conv, x)) {
            Some(layer) => layer.calls += 1,
            None => found.push(Layer { conv, x, calls: 1 }),
        }
    };
    let (mut side, mut channels) = (size.div_ceil(2), network.stem);
    for block in network.stages.iter().flat_map(|stage| &stage.blocks) {
        let (inputs, middle, outputs) = (block.inputs, block.expanded(), block.outputs);
        let after = side.div_ceil(block.stride);
        match block.kind {
            BlockKind::FusedMbConv if block.expansion == 1 => {
                add(ConvKind::Dense, block.kernel, block.stride, inputs, outputs, side);
            }
            BlockKind::FusedMbConv => {
                add(ConvKind::Dense, block.kernel, block.stride, inputs, middle, side);
                add(ConvKind::Pointwise, 1, 1, middle, outputs, after);
            }
            BlockKind::MbConv => {
                if block.expansion != 1 {
                    add(ConvKind::Pointwise, 1, 1, inputs, middle, side);
                }
                add(ConvKind::Depthwise, block.kernel, block.stride, middle, middle, side);
                add(ConvKind::Pointwise, 1, 1, middle, outputs, after);
            }
        }
        (side, channels) = (after, outputs);
    }
    add(ConvKind::Pointwise, 1, 1, channels, network.head, side);
    found
}

/// What is timed of a layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Pass {
    /// The output.
    Forward,
    /// The gradient of the input.
    Data,
    /// The gradient of the weights.
    Weights,
    /// Both gradients: of ours one launch, of a library's two.
    Backward,
}

impl Pass {
    /// Those that our kernels of a kind have.
    const fn of(kind: ConvKind) -> &'static [Self] {
        match kind {
            ConvKind::Dense => &[Self::Forward, Self::Data, Self::Weights],
            ConvKind::Depthwise => &[Self::Forward, Self::Backward],
            ConvKind::Pointwise => &[Self::Forward, Self::Data, Self::Weights, Self::Backward],
        }
    }

    const fn directions(self) -> &'static [Direction] {
        match self {
            Self::Forward => &[Direction::Forward],
            Self::Data => &[Direction::Data],
            Self::Weights => &[Direction::Weights],
            Self::Backward => &[Direction::Data, Direction::Weights],
        }
    }

    /// Its name.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Forward => "forward",
            Self::Data => "data",
            Self::Weights => "weights",
            Self::Backward => "backward",
        }
    }
}

/// One pass of one layer on both sides.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LibraryResult {
    /// "library".
    pub kind: String,
    /// The network.
    pub model: String,
    /// Side of its images in pixels.
    pub size: usize,
    /// The layer in words.
    pub layer: String,
    /// What it reads: images, rows, columns, channels.
    pub input: [usize; 4],
    /// How often the network has it.
    pub calls: usize,
    /// What is computed.
    pub pass: Pass,
    /// The element type of tensors.
    pub dtype: Dtype,
    /// How both were run: "graph" when they were replayed, "plain" else.
    pub mode: String,
    /// Ours.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub time: Option<Milliseconds>,
    /// The library's name and version.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub library: Option<String>,
    /// What the library was measured with: the fastest that computes the same.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub algorithm: Option<String>,
    /// The library's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub library_time: Option<Milliseconds>,
    /// Why there are no figures.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

impl LibraryResult {
    /// The library's time over ours: above 1 we are faster.
    pub fn ratio(&self) -> Option<f64> {
        Some(self.library_time?.median / self.time?.median)
    }
}

/// Our plan for a layer.
#[derive(Debug)]
enum Plan<T> {
    Dense(Conv3x3<T>),
    Depthwise(Depthwise<T>),
    Pointwise(Pointwise<T>),
}

impl<T: FusedElement> Plan<T> {
    fn new(device: &Device, layer: &Layer, dtype: Dtype) -> Result<Self> {
        let (Layer { conv, x, .. }, rule) = (layer, Choices::default());
        Ok(match conv.kind {
            ConvKind::Dense => Self::Dense(Conv3x3::plan_with(device, conv, *x, dtype, rule)?),
            ConvKind::Depthwise => Self::Depthwise(Depthwise::plan(device, conv, *x)?),
            ConvKind::Pointwise => {
                Self::Pointwise(Pointwise::plan_with(device, *x, conv.outputs, dtype, rule)?)
            }
        })
    }

    fn workspace_floats(&self) -> usize {
        match self {
            Self::Dense(plan) => plan.workspace_floats(),
            Self::Depthwise(plan) => plan.workspace_floats(),
            Self::Pointwise(plan) => plan.workspace_floats(),
        }
    }

    fn run(&self, device: &Device, pass: Pass, set: &mut Set<T>) -> Result<()> {
        let stream = device.compute();
        let Set { tensors, weight, owed, workspace } = set;
        let Tensors { x, y, g, dx, dweight, .. } = tensors;
        let (x, weight, g, owed) = (x.as_view(), weight.as_view(), g.as_view(), owed.as_view());
        let input = Input::Plain(&x);
        if pass == Pass::Forward {
            let mut y = y.as_view_mut();
            return match self {
                Self::Dense(plan) => plan.fprop(stream, input, &weight, &mut y, Output::Plain, workspace),
                Self::Depthwise(plan) => plan.fprop(stream, input, &weight, &mut y, Output::Plain, workspace),
                Self::Pointwise(plan) => plan.fprop(stream, input, &weight, &mut y, Output::Plain, workspace),
            };
        }
        let (y, mut dx, mut dweight) = (y.as_view(), dx.as_view_mut(), dweight.as_view_mut());
        let gradient = GradientView { g: &g, y: &y, owed: &owed, arrival: Arrival::Alone };
        let to = GradientOutput::Plain { skip: None };
        match (self, pass) {
            (Self::Dense(plan), Pass::Data) => plan.dgrad(stream, gradient, &weight, &mut dx, to),
            (Self::Dense(plan), Pass::Weights) => {
                plan.wgrad(stream, input, gradient, &mut dweight, workspace)
            }
            (Self::Pointwise(plan), Pass::Data) => {
                plan.dgrad(stream, gradient, &weight, &mut dx, to, workspace)
            }
            (Self::Pointwise(plan), Pass::Weights) => {
                plan.wgrad(stream, input, gradient, &mut dweight, workspace)
            }
            (Self::Pointwise(plan), _) => {
                plan.backward(stream, input, gradient, &weight, &mut dx, &mut dweight, to, workspace)
            }
            (Self::Depthwise(plan), _) => {
                plan.backward(stream, input, gradient, &weight, &mut dx, &mut dweight, to, workspace)
            }
            (Self::Dense(_), _) => {
                let problem = "its two gradients are two launches".into();
                Err(Error::Shape { operation: "3×3 convolution", problem })
            }
        }
    }
}

/// Buffers of a layer.
#[derive(Debug)]
struct Set<T> {
    tensors: Tensors<T>,
    /// As our kernels have it: of depthwise convolutions \[kh, kw, c\].
    weight: CudaSlice<T>,
    /// a = 1, b = c = 0: the gradient is g.
    owed: CudaSlice<f32>,
    workspace: Workspace,
}

impl<T: FusedElement> Set<T> {
    fn new(device: &Device, layer: &Layer, dtype: Dtype, seed: u32, floats: usize) -> Result<Self> {
        let (x, y) = (layer.x, layer.conv.output(layer.x)?);
        let weights = layer.conv.weights();
        let weight: Vec<T> = noise::<f32>(weights, 5).into_iter().map(T::narrow).collect();
        let theirs = match layer.conv.kind {
            ConvKind::Depthwise => transposed(&weight, x.c),
            ConvKind::Dense | ConvKind::Pointwise => weight.clone(),
        };
        let mut owed = vec![0.0; 3 * y.c];
        owed[..y.c].fill(1.0);
        let [x, y] = [x, y].map(|shape| shape.elements());
        Ok(Self {
            tensors: Tensors {
                dtype,
                x: random(device, x, 16 + 4 * seed)?,
                weight: device.upload(&theirs)?,
                y: device.zeros(y)?,
                g: random(device, y, 17 + 4 * seed)?,
                dx: device.zeros(x)?,
                dweight: device.zeros(weights)?,
                typed_dweight: device.zeros(weights)?,
            },
            weight: device.upload(&weight)?,
            owed: device.upload(&owed)?,
            workspace: Workspace::new(device, floats)?,
        })
    }
}

/// \[taps, c\] as \[c, taps\].
fn transposed<V: Copy>(values: &[V], channels: usize) -> Vec<V> {
    let taps = values.len() / channels;
    (0..values.len()).map(|i| values[i % taps * channels + i / taps]).collect()
}

/// Both sides of a layer, and what they work on.
#[derive(Debug)]
struct Bout<T> {
    device: Device,
    layer: Layer,
    dtype: Dtype,
    plan: Plan<T>,
    sets: RefCell<Vec<Set<T>>>,
}

impl<T: FusedElement> Bout<T> {
    fn new(device: &Device, layer: &Layer, dtype: Dtype, cache: usize) -> Result<Self> {
        let plan = Plan::new(device, layer, dtype)?;
        let y = layer.conv.output(layer.x)?;
        let bytes = T::DTYPE.bytes() * (layer.x.elements() + y.elements());
        let count = (3 * cache).div_ceil(bytes).clamp(1, 8);
        let floats = plan.workspace_floats();
        let set = |i: usize| Set::new(device, layer, dtype, i as u32, floats);
        let sets = (0..count).map(set).collect::<Result<_>>()?;
        Ok(Self { device: device.clone(), layer: *layer, dtype, plan, sets: RefCell::new(sets) })
    }

    fn library(&self, libraries: &Libraries, direction: Direction) -> Result<Operation> {
        let mut sets = self.sets.borrow_mut();
        libraries.operation(&self.layer.conv, self.layer.x, direction, &mut sets[0].tensors)
    }

    /// The first elements of what `pass` computes in `direction`: by `operation`, or by our kernels.
    fn values(
        &self,
        pass: Pass,
        direction: Direction,
        operation: Option<(&Operation, usize)>,
    ) -> Result<Vec<f32>> {
        let (device, conv) = (&self.device, &self.layer.conv);
        let set = &mut self.sets.borrow_mut()[0];
        device.clear(&mut set.tensors.dweight)?;
        match operation {
            Some((operation, algorithm)) => operation.run(algorithm, &mut set.tensors)?,
            None => self.plan.run(device, pass, set)?,
        }
        let wide = |buffer: &CudaSlice<T>| values(device, buffer);
        match direction {
            Direction::Forward => wide(&set.tensors.y),
            Direction::Data => wide(&set.tensors.dx),
            Direction::Weights if operation.is_some() && conv.kind != ConvKind::Pointwise => {
                wide(&set.tensors.typed_dweight)
            }
            Direction::Weights if conv.kind == ConvKind::Pointwise => values(device, &set.tensors.dweight),
            Direction::Weights => {
                let values: Vec<f32> = device.read(&set.tensors.dweight)?;
                let taps = conv.kernel * conv.kernel;
                Ok(match conv.kind {
                    ConvKind::Depthwise => transposed(&values, values.len() / taps),
                    ConvKind::Dense | ConvKind::Pointwise => values,
                })
            }
        }
    }

    /// The fastest algorithm of each operation of `pass` that computes what our kernels do.
    fn agreeing(&self, pass: Pass, operations: &[Operation]) -> Result<Vec<usize>> {
        let choose = |(operation, &direction): (&Operation, &Direction)| {
            let ours = self.values(pass, direction, None)?;
            let y = self.layer.conv.output(self.layer.x)?;
            let terms = match direction {
                Direction::Forward | Direction::Data => self.layer.conv.weights() / self.layer.x.c.min(y.c),
                Direction::Weights => y.pixels(),
            };
            let bound = bound(self.dtype, terms);
            let mut least = f64::INFINITY;
            for algorithm in 0..operation.algorithms().len() {
                let theirs = self.values(pass, direction, Some((operation, algorithm)))?;
                let error = difference(&ours, &theirs);
                if error <= bound {
                    return Ok(algorithm);
                }
                least = least.min(error);
            }
            Err(Error::Library {
                library: "every algorithm",
                action: "agree with our kernels".into(),
                problem: format!("relative errors from {least:.1e}, allowed are {bound:.1e}"),
            })
        };
        operations.iter().zip(pass.directions()).map(choose).collect()
    }

    fn time(
        self: &Rc<Self>,
        libraries: &Libraries,
        pass: Pass,
        effort: Effort,
        result: &mut LibraryResult,
    ) -> Result<()> {
        let operations: Vec<Operation> = pass
            .directions()
            .iter()
            .map(|&direction| self.library(libraries, direction))
            .collect::<Result<_>>()?;
        let algorithms = self.agreeing(pass, &operations)?;
        let name = |(operation, &i): (&Operation, &usize)| operation.algorithms()[i].clone();
        result.algorithm = Some(operations.iter().zip(&algorithms).map(name).collect::<Vec<_>>().join(" + "));
        result.library = Some(operations[0].library().to_owned());
        let theirs: Rc<[_]> = operations.into_iter().zip(algorithms).collect();
        let sides = || {
            [None, Some(&theirs)].map(|operations| Side {
                bout: Rc::clone(self),
                pass,
                operations: operations.map(Rc::clone),
            })
        };
        let count = self.sets.borrow().len() as f64;
        // Whatever is set up on first use cannot be recorded.
        sides().iter_mut().try_for_each(Side::all)?;
        let record = |side| Graph::record(&self.device, side, Side::all);
        let graphs = match self.device.is_host() {
            true => None,
            // A library may do what cannot be recorded: then both are called one by one.
            false => match sides().map(record) {
                [Ok(ours), Ok(theirs)] => Some([ours, theirs]),
                _ => None,
            },
        };
        let (mode, [ours, theirs]) = match graphs {
            Some(mut graphs) => ("graph", alternate(&self.device, effort, |i| graphs[i].launch())?),
            None => {
                let mut sides = sides();
                ("plain", alternate(&self.device, effort, |i| sides[i].all())?)
            }
        };
        result.mode = mode.into();
        let [ours, theirs] =
            [ours, theirs].map(|rounds| rounds.iter().map(|seconds| seconds / count).collect::<Vec<_>>());
        (result.time, result.library_time) = (Some(Milliseconds::of(&ours)), Some(Milliseconds::of(&theirs)));
        Ok(())
    }
}

/// One side of a bout: the library's operations with their algorithms, or our kernels.
#[derive(Debug)]
struct Side<T> {
    bout: Rc<Bout<T>>,
    pass: Pass,
    operations: Option<Rc<[(Operation, usize)]>>,
}

impl<T: FusedElement> Side<T> {
    /// Goes through all sets.
    fn all(&mut self) -> Result<()> {
        let Bout { device, plan, sets, .. } = &*self.bout;
        for set in sets.borrow_mut().iter_mut() {
            match &self.operations {
                None => plan.run(device, self.pass, set)?,
                Some(operations) => {
                    for (operation, algorithm) in operations.iter() {
                        operation.run(*algorithm, &mut set.tensors)?;
                    }
                }
            }
        }
        Ok(())
    }
}

/// What to measure.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The network's name.
    pub model: String,
    /// Side of its images in pixels.
    pub size: usize,
    /// Its layers.
    pub layers: Vec<Layer>,
    /// What products are computed in.
    pub dtype: Dtype,
    /// How long to take for a figure.
    pub effort: Effort,
    /// How long to take in all: no layer is begun afterwards.
    pub limit: Duration,
}

/// Measures all layers on `device` for which there is a library; `done` is called after each. What fails in one pass is told in
/// its result. `T` is the type of tensors in `settings.dtype`.
///
/// # Errors
/// [`Error::Driver`] from then on where the device has failed: no other figure would be right.
pub fn run<T: FusedElement>(
    device: &Device,
    libraries: &Libraries,
    settings: &Settings,
    mut done: impl FnMut(),
) -> Result<Vec<LibraryResult>> {
    let cache = if device.is_host() { 0 } else { device.gpu().cache };
    let (start, mut results) = (Instant::now(), Vec::new());
    for layer in settings.layers.iter().filter(|layer| libraries.has(layer.conv.kind)) {
        if start.elapsed() > settings.limit {
            break;
        }
        let bout = Rc::new(Bout::<T>::new(device, layer, settings.dtype, cache)?);
        for &pass in Pass::of(layer.conv.kind) {
            let mut result = LibraryResult {
                kind: "library".into(),
                model: settings.model.clone(),
                size: settings.size,
                layer: words(&layer.conv),
                input: [layer.x.n, layer.x.h, layer.x.w, layer.x.c],
                calls: layer.calls,
                pass,
                dtype: settings.dtype,
                mode: "plain".into(),
                time: None,
                library: None,
                algorithm: None,
                library_time: None,
                error: None,
            };
            if let Err(error) = bout.time(libraries, pass, settings.effort, &mut result) {
                device.synchronize()?;
                result.error = Some(error.to_string());
            }
            results.push(result);
        }
        done();
    }
    Ok(results)
}

fn words(conv: &Conv) -> String {
    let kind = match conv.kind {
        ConvKind::Dense => "dense",
        ConvKind::Depthwise => "depthwise",
        ConvKind::Pointwise => "pointwise",
    };
    let stride = if conv.stride == 1 { String::new() } else { format!(" /{}", conv.stride) };
    format!("{kind} {k}×{k} {}→{}{stride}", conv.inputs, conv.outputs, k = conv.kernel)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Architecture;

    #[test]
    fn every_convolution_of_s_is_listed_once_and_counted() {
        let network = Architecture::find("s").unwrap().network(1000);
        let layers = layers(&network, 300, 64);
        assert_eq!(words(&layers[0].conv), "dense 3×3 24→24");
        assert_eq!((layers[0].x, layers[0].calls), (Shape::new(64, 150, 150, 24), 2));
        let last = layers.last().unwrap();
        assert_eq!(
            (words(&last.conv).as_str(), last.x),
            ("pointwise 1×1 256→1280", Shape::new(64, 10, 10, 256))
        );
        // 2 + 2·4 + 2·4 of stages 1 to 3, three each of the 30 blocks behind, and the last.
        assert_eq!(layers.iter().map(|layer| layer.calls).sum::<usize>(), 2 + 8 + 8 + 90 + 1);
        for (i, layer) in layers.iter().enumerate() {
            assert!(layers[..i].iter().all(|other| (other.conv, other.x) != (layer.conv, layer.x)));
        }
    }

    #[test]
    fn weights_are_transposed() {
        assert_eq!(transposed(&[1, 2, 3, 4, 5, 6], 3), [1, 4, 2, 5, 3, 6]);
    }
}
