//! The paper's question, shape by shape: is this block the faster as Fused-MBConv or as MBConv?

use super::Bench;
use super::floor::{Ceiling, block_backward, block_forward};
use super::timing::{Clock, Milliseconds, alternate};
use crate::backend::{Backend, Mode, StepKey, Variables};
use crate::model::{Architecture, block_count};
use crate::nn::{BatchNormSpec, Block, BlockKind, BlockSpec, Layout, NetworkSpec};
use crate::tensor::{Dtype, Padding, Shape};
use crate::{Error, Result};
use serde::{Deserialize, Serialize};
use std::str::FromStr;

/// The share of a block's input channels that its squeeze-excitation has inside, as MBConv.
const SQUEEZE_RATIO: f64 = 0.25;

/// What a block is, but for its kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlockShape {
    /// Input channels.
    pub inputs: usize,
    /// Output channels.
    pub outputs: usize,
    /// Expanded channels over input channels.
    pub expansion: usize,
    /// Side of the dense or depthwise kernel.
    pub kernel: usize,
    /// Of that convolution.
    pub stride: usize,
    /// Side of the input in pixels.
    pub side: usize,
}

impl BlockShape {
    /// The block as one of the two kinds. MBConv gets a squeeze-excitation, Fused-MBConv none, as in every published
    /// network.
    pub fn spec(&self, kind: BlockKind) -> BlockSpec {
        let &Self { inputs, outputs, expansion, kernel, stride, .. } = self;
        let reduced = ((inputs as f64 * SQUEEZE_RATIO) as usize).max(1);
        let squeeze = (kind == BlockKind::MbConv).then_some(reduced);
        BlockSpec { kind, kernel, stride, expansion, inputs, outputs, squeeze, drop_path: 0.0 }
    }

    /// Side of the output.
    pub const fn output_side(&self) -> usize {
        self.side.div_ceil(self.stride)
    }
}

impl std::fmt::Display for BlockShape {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { inputs, outputs, expansion, kernel, stride, side } = self;
        write!(f, "{inputs}→{outputs} ×{expansion} k{kernel} s{stride} @{side}")
    }
}

impl FromStr for BlockShape {
    type Err = String;

    /// `inputs,outputs,expansion,kernel,stride,side`.
    fn from_str(text: &str) -> std::result::Result<Self, String> {
        let numbers: Option<Vec<usize>> = text.split(',').map(|word| word.trim().parse().ok()).collect();
        let Some(&[inputs, outputs, expansion, kernel, stride, side]) = numbers.as_deref() else {
            return Err("six whole numbers are needed: inputs,outputs,expansion,kernel,stride,side".into());
        };
        let is_channels = |n: usize| (8..=1 << 14).contains(&n) && n.is_multiple_of(8);
        if !is_channels(inputs) || !is_channels(outputs) {
            return Err("channels must be multiples of 8, from 8 to 16384".into());
        }
        if !(1..=16).contains(&expansion) {
            return Err("the expansion must be from 1 to 16".into());
        }
        if ![3, 5].contains(&kernel) || ![1, 2].contains(&stride) {
            return Err("the kernel must be 3 or 5, the stride 1 or 2".into());
        }
        if !(2..=4096).contains(&side) {
            return Err("the side must be from 2 to 4096".into());
        }
        Ok(Self { inputs, outputs, expansion, kernel, stride, side })
    }
}

/// A shape and where it stands in a network.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Place {
    /// The network; "given" for a shape of the user's own.
    pub model: String,
    /// The stage, counted from 1; 0 for a shape of the user's own.
    pub stage: usize,
    /// How many blocks of the network have this shape.
    pub count: usize,
    /// What the block is there.
    pub native: Option<BlockKind>,
    /// The shape.
    #[serde(flatten)]
    pub shape: BlockShape,
}

/// The distinct shapes of `network` on images of `size` pixels, in forward order.
pub fn shapes(network: &NetworkSpec, size: usize) -> Vec<Place> {
    let mut side = size.div_ceil(2);
    let mut places: Vec<Place> = Vec::new();
    for (stage, spec) in network.stages.iter().enumerate() {
        for block in &spec.blocks {
            let &BlockSpec { inputs, outputs, expansion, kernel, stride, .. } = block;
            let shape = BlockShape { inputs, outputs, expansion, kernel, stride, side };
            side = shape.output_side();
            match places.iter_mut().find(|place| place.shape == shape) {
                Some(place) => place.count += 1,
                None => places.push(Place {
                    model: network.name.clone(),
                    stage: stage + 1,
                    count: 1,
                    native: Some(block.kind),
                    shape,
                }),
            }
        }
    }
    places
}

/// One shape as one kind of block.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct BlockResult {
    /// "block".
    pub kind: String,
    /// Where it stands.
    #[serde(flatten)]
    pub place: Place,
    /// What it was built as.
    pub form: BlockKind,
    /// Images at once.
    pub batch: usize,
    /// The element type of tensors.
    pub dtype: Dtype,
    /// How it was run: "plain", or a mode of a peer.
    pub mode: String,
    /// Forward in training mode.
    pub forward: Milliseconds,
    /// Backward: of input and parameters.
    pub backward: Milliseconds,
    /// Images a second through both.
    pub images_per_second: f64,
    /// Multiply-adds of the forward, for one image.
    pub macs: usize,
    /// Operations a second, forward and backward: six for each multiply-add.
    pub operations_per_second: f64,
    /// On a GPU: the least bytes of both, over their time.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bytes_per_second: Option<f64>,
    /// On a GPU whose ceiling is known: the least time for both, over the time they take.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub of_floor: Option<f64>,
}

impl BlockResult {
    /// Forward and backward, in milliseconds.
    pub fn milliseconds(&self) -> f64 {
        self.forward.median + self.backward.median
    }

    /// How far its rounds lie apart, over the time.
    pub fn spread(&self) -> f64 {
        let widths = [self.forward, self.backward].map(|figure| figure.max - figure.min);
        (widths[0] + widths[1]) / self.milliseconds()
    }
}

/// How to measure blocks.
#[derive(Clone, Copy, Debug)]
pub struct Settings {
    /// Images at once.
    pub batch: usize,
    /// The element type of tensors.
    pub dtype: Dtype,
    /// Whether bytes are counted: only for the dataflow of the kernels does the count hold.
    pub count_bytes: bool,
    /// What the GPU reaches, if known.
    pub ceiling: Option<Ceiling>,
}

/// Measures `place` as `form`.
///
/// # Errors
/// What backend and clock say; [`Error::Shape`] for a shape that the backend cannot compute, such as one with a single
/// value per channel, which cannot be normalised.
pub fn measure<B: Backend, C: Clock>(
    bench: &mut Bench<'_, B, C>,
    place: &Place,
    form: BlockKind,
    settings: &Settings,
) -> Result<BlockResult> {
    let &Settings { batch, dtype, .. } = settings;
    let (shape, spec) = (place.shape, place.shape.spec(form));
    let norm = BatchNormSpec { epsilon: 1e-3, momentum: 0.01, variance: Default::default() };
    let mut layout = Layout::default();
    let block = Block::new("block", 0, &spec, Padding::Symmetric, &norm, &mut layout);
    let out = shape.output_side();
    let x = Shape::new(batch, shape.side, shape.side, shape.inputs);
    let gradient = Shape::new(batch, out, out, shape.outputs);
    let counts = [x, gradient].map(|shape| bench.rotation(shape));
    bench.backend.prepare(|rehearsal| rehearse(rehearsal, &block, &layout, [x, gradient], counts))?;
    let mut vars = bench.variables(&layout)?;
    let inputs = bench.inputs(x, 1)?;
    let gradients = bench.inputs(gradient, 2)?;
    let images = (0..batch as u32).collect();
    let Bench { backend, clock, effort, .. } = bench;
    backend.begin_step(&StepKey { seed: 0, epoch: 0, images })?;
    let mut turn = 0;
    let [forward, both] = alternate(*clock, *effort, |part| {
        let (x, gradient) = (&inputs[turn % inputs.len()], &gradients[turn % gradients.len()]);
        turn += 1;
        let (_, tape) = block.forward(*backend, x, &mut vars, Mode::Train)?;
        if part == 1 {
            block.backward(*backend, x, tape, gradient, &mut vars)?;
        }
        Ok(())
    })?;
    // Backward cannot be run again and again without its forward: it is what both take more, round by round.
    let more: Vec<f64> = forward.iter().zip(&both).map(|(one, both)| (both - one).max(0.0)).collect();
    let (forward, backward) = (Milliseconds::of(&forward), Milliseconds::of(&more));
    let seconds = (forward.median + backward.median) / 1e3;
    let macs = block_count(&spec, shape.side).macs;
    let mut launches = block_forward(&spec, shape.side, batch, dtype);
    launches.extend(block_backward(&spec, shape.side, batch, dtype));
    let bytes: u64 = launches.iter().map(|least| least.bytes).sum();
    Ok(BlockResult {
        kind: "block".into(),
        place: place.clone(),
        form,
        batch,
        dtype,
        mode: "plain".into(),
        forward,
        backward,
        images_per_second: batch as f64 / seconds,
        macs,
        operations_per_second: 6.0 * (macs * batch) as f64 / seconds,
        bytes_per_second: settings.count_bytes.then_some(bytes as f64 / seconds),
        of_floor: settings.ceiling.map(|ceiling| ceiling.seconds(&launches, dtype) / seconds),
    })
}

/// Goes through what is measured, for a backend that must know its memory beforehand.
fn rehearse<B: Backend>(
    backend: &mut B,
    block: &Block,
    layout: &Layout,
    shapes: [Shape; 2],
    counts: [usize; 2],
) -> Result<()> {
    let (params, stats) = (backend.zeros(layout.param_buffer())?, backend.zeros(layout.stat_buffer())?);
    let grads = backend.zeros(layout.param_buffer())?;
    let mut vars = Variables { params, grads, stats };
    let tensors = |shape, count| (0..count).map(|_| backend.tensor(shape, Vec::new())).collect::<Result<_>>();
    let inputs: Vec<B::Activation> = tensors(shapes[0], counts[0])?;
    let gradients: Vec<B::Activation> = tensors(shapes[1], counts[1])?;
    let (_, tape) = block.forward(backend, &inputs[0], &mut vars, Mode::Train)?;
    block.backward(backend, &inputs[0], tape, &gradients[0], &mut vars).map(drop)
}

/// Where MBConv becomes the faster form within the shapes of one network.
#[derive(Clone, Debug, PartialEq)]
pub struct Crossover {
    /// The network.
    pub model: String,
    /// The first shape at which MBConv is faster, by its index among the network's; none where it never is.
    pub first: Option<usize>,
    /// Time of Fused-MBConv over that of MBConv, shape by shape in forward order.
    pub ratios: Vec<(Place, f64)>,
    /// Indices of shapes whose two times differ by less than they vary from round to round.
    pub undecided: Vec<usize>,
}

/// Finds the crossover of each network in `results`, which hold each shape in both forms, in forward order.
pub fn crossovers(results: &[BlockResult]) -> Vec<Crossover> {
    let mut found: Vec<Crossover> = Vec::new();
    for fused in results.iter().filter(|r| r.form == BlockKind::FusedMbConv) {
        let same = |r: &&BlockResult| r.form == BlockKind::MbConv && r.place == fused.place;
        let Some(mb) = results.iter().find(same) else { continue };
        let place = &fused.place;
        if found.last().is_none_or(|last| last.model != place.model) {
            let model = place.model.clone();
            found.push(Crossover { model, first: None, ratios: Vec::new(), undecided: Vec::new() });
        }
        let Some(crossover) = found.last_mut() else { continue };
        let (index, ratio) = (crossover.ratios.len(), fused.milliseconds() / mb.milliseconds());
        if ratio > 1.0 && crossover.first.is_none() {
            crossover.first = Some(index);
        }
        if (ratio - 1.0).abs() < fused.spread().max(mb.spread()) {
            crossover.undecided.push(index);
        }
        crossover.ratios.push((place.clone(), ratio));
    }
    found
}

impl std::fmt::Display for Crossover {
    /// In words, one sentence or two.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let describe = |(place, ratio): &(Place, f64)| {
            let stage = if place.stage == 0 { String::new() } else { format!("stage {}, ", place.stage) };
            let faster = if *ratio > 1.0 { *ratio } else { 1.0 / ratio };
            format!("{stage}{}, by a factor of {faster:.2}", place.shape)
        };
        write!(f, "{}: ", self.model)?;
        let total = self.ratios.len();
        match self.first {
            None => write!(f, "Fused-MBConv is the faster at every one of {total} shapes")?,
            Some(0) => {
                write!(f, "MBConv is the faster from the first shape on ({})", describe(&self.ratios[0]))?;
            }
            Some(first) => write!(
                f,
                "Fused-MBConv is the faster at the first {first} of {total} shapes; MBConv from {}",
                describe(&self.ratios[first])
            )?,
        }
        if let Some(first) = self.first {
            let back: Vec<_> =
                self.ratios[first..].iter().filter(|(_, ratio)| *ratio < 1.0).map(describe).collect();
            if !back.is_empty() {
                write!(f, ", but Fused-MBConv again at {}", back.join("; "))?;
            }
        }
        match self.undecided.len() {
            0 => write!(f, "."),
            1 => write!(f, ". At 1 shape the two differ by less than the rounds do."),
            n => write!(f, ". At {n} shapes the two differ by less than the rounds do."),
        }
    }
}

/// The shapes of the networks called `names`, each at its training size or at `size`.
///
/// # Errors
/// [`Error::Usage`] for an unknown name.
pub fn shapes_of(names: &[String], size: Option<usize>) -> Result<Vec<Place>> {
    let mut places = Vec::new();
    for name in names {
        let architecture = Architecture::find(name)?;
        let side = size.unwrap_or(architecture.train_size);
        places.extend(shapes(&architecture.network(1000), side));
    }
    match places.is_empty() {
        true => Err(Error::usage("--models", names.join(","), "names no network")),
        false => Ok(places),
    }
}

#[cfg(test)]
mod tests {
    use super::super::timing::{Effort, HostClock};
    use super::*;
    use crate::reference::Reference;

    const FUSED: BlockKind = BlockKind::FusedMbConv;
    const MB: BlockKind = BlockKind::MbConv;

    fn place(model: &str, stage: usize) -> Place {
        let shape = BlockShape { inputs: 8 * stage, outputs: 8, expansion: 4, kernel: 3, stride: 1, side: 8 };
        Place { model: model.into(), stage, count: 1, native: None, shape }
    }

    /// A result of `milliseconds`, whose rounds lie one part in `sharpness` apart.
    fn result(place: &Place, form: BlockKind, milliseconds: f64, sharpness: f64) -> BlockResult {
        let half = milliseconds / 2.0;
        let figure = Milliseconds { median: half, min: half, max: half * (1.0 + 1.0 / sharpness), rounds: 3 };
        BlockResult {
            kind: "block".into(),
            place: place.clone(),
            form,
            batch: 1,
            dtype: Dtype::F32,
            mode: "plain".into(),
            forward: figure,
            backward: figure,
            images_per_second: 1e3 / milliseconds,
            macs: 1,
            operations_per_second: 1.0,
            bytes_per_second: None,
            of_floor: None,
        }
    }

    fn words(times: &[(f64, f64)], sharpness: f64) -> String {
        let mut results = Vec::new();
        for (i, &(fused, mb)) in times.iter().enumerate() {
            let place = place("s", i + 1);
            results.extend([result(&place, FUSED, fused, sharpness), result(&place, MB, mb, sharpness)]);
        }
        let found = crossovers(&results);
        assert_eq!(found.len(), 1);
        found[0].to_string()
    }

    #[test]
    fn the_crossover_is_the_first_shape_at_which_mbconv_is_faster() {
        assert_eq!(
            words(&[(1.0, 2.0), (2.0, 3.0), (3.0, 2.0), (6.0, 2.0)], 1e3),
            "s: Fused-MBConv is the faster at the first 2 of 4 shapes; MBConv from stage 3, 24→8 ×4 k3 s1 @8, by a \
             factor of 1.50."
        );
        assert_eq!(words(&[(1.0, 2.0)], 1e3), "s: Fused-MBConv is the faster at every one of 1 shapes.");
        assert_eq!(
            words(&[(4.0, 2.0), (4.0, 1.0)], 1e3),
            "s: MBConv is the faster from the first shape on (stage 1, 8→8 ×4 k3 s1 @8, by a factor of 2.00)."
        );
    }

    #[test]
    fn shapes_that_turn_back_or_are_undecided_are_said() {
        let text = words(&[(1.0, 2.0), (3.0, 2.0), (1.0, 2.0), (1.0, 1.01)], 20.0);
        assert!(
            text.contains(
                "but Fused-MBConv again at stage 3, 24→8 ×4 k3 s1 @8, by a factor of 2.00; stage 4"
            )
        );
        assert!(text.ends_with("At 1 shape the two differ by less than the rounds do."), "{text}");
        let text = words(&[(1.0, 1.02), (1.02, 1.0)], 20.0);
        assert!(text.ends_with("At 2 shapes the two differ by less than the rounds do."), "{text}");
    }

    #[test]
    fn networks_are_told_apart_and_a_shape_in_one_form_is_left_out() {
        let (a, b, c) = (place("s", 1), place("m", 1), place("m", 2));
        let results = [
            result(&a, FUSED, 1.0, 1e3),
            result(&a, MB, 2.0, 1e3),
            result(&b, FUSED, 1.0, 1e3),
            result(&c, FUSED, 3.0, 1e3),
            result(&c, MB, 2.0, 1e3),
        ];
        let found = crossovers(&results);
        assert_eq!(
            found.iter().map(|c| (c.model.as_str(), c.first)).collect::<Vec<_>>(),
            [("s", None), ("m", Some(0))]
        );
        assert_eq!(found[1].ratios, [(c, 1.5)]);
    }

    #[test]
    fn the_shapes_of_s_are_those_of_the_paper() {
        let network = Architecture::find("s").unwrap().network(1000);
        let places = shapes(&network, 300);
        assert_eq!(places.iter().map(|p| p.count).sum::<usize>(), 40);
        let text: Vec<_> = places.iter().map(|p| format!("{} {} {}", p.stage, p.count, p.shape)).collect();
        assert_eq!(
            text[..5],
            [
                "1 2 24→24 ×1 k3 s1 @150",
                "2 1 24→48 ×4 k3 s2 @150",
                "2 3 48→48 ×4 k3 s1 @75",
                "3 1 48→64 ×4 k3 s2 @75",
                "3 3 64→64 ×4 k3 s1 @38"
            ]
        );
        assert_eq!(text.last().unwrap(), "6 14 256→256 ×6 k3 s1 @10");
        assert_eq!(places[3].native, Some(FUSED));
        assert_eq!(places[5].native, Some(MB));
        assert_eq!(places[5].shape.spec(MB).squeeze, Some(16));
        assert_eq!(places[5].shape.spec(FUSED).squeeze, None);
    }

    #[test]
    fn given_shapes_are_read_or_refused() {
        let shape = BlockShape { inputs: 24, outputs: 48, expansion: 4, kernel: 3, stride: 2, side: 75 };
        assert_eq!("24, 48,4,3,2,75".parse(), Ok(shape));
        for (text, says) in [
            ("24,48,4,3,2", "six whole numbers"),
            ("24,48,4,3,2,x", "six whole numbers"),
            ("23,48,4,3,2,75", "multiples of 8"),
            ("24,0,4,3,2,75", "multiples of 8"),
            ("24,48,0,3,2,75", "expansion"),
            ("24,48,4,4,2,75", "kernel"),
            ("24,48,4,3,3,75", "stride"),
            ("24,48,4,3,2,1", "side"),
        ] {
            let error = text.parse::<BlockShape>().unwrap_err();
            assert!(error.contains(says), "{text}: {error}");
        }
    }

    #[test]
    fn a_block_is_measured_in_both_forms() {
        let mut backend = Reference::<f32>::new();
        let effort = Effort { rounds: 3, round_seconds: 0.0, warm_up_seconds: 0.0 };
        let mut bench = Bench { backend: &mut backend, clock: &HostClock, effort, cache: 0 };
        let settings = Settings { batch: 2, dtype: Dtype::F32, count_bytes: false, ceiling: None };
        let place = place("s", 1);
        for (form, macs) in
            [(FUSED, 64 * (9 * 8 * 32 + 32 * 8)), (MB, 64 * (2 * 8 * 32 + 9 * 32) + 2 * 2 * 32)]
        {
            let found = measure(&mut bench, &place, form, &settings).unwrap();
            assert_eq!((found.macs, found.forward.rounds, found.of_floor), (macs, 3, None));
            let seconds = found.milliseconds() / 1e3;
            assert!(seconds > 0.0 && (found.images_per_second * seconds - 2.0).abs() < 1e-9);
            let json = serde_json::to_value(&found).unwrap();
            assert_eq!((&json["inputs"], &json["form"]), (&8.into(), &serde_json::to_value(form).unwrap()));
            assert!(json.get("of_floor").is_none());
        }
        let settings = Settings {
            count_bytes: true,
            ceiling: Some(Ceiling { bandwidth: 1.0, tensor: 1e30, plain: 1e30 }),
            ..settings
        };
        let found = measure(&mut bench, &place, FUSED, &settings).unwrap();
        // A ceiling of one byte a second makes both the same number.
        assert!((found.bytes_per_second.unwrap() / found.of_floor.unwrap() - 1.0).abs() < 1e-9);
    }
}
