//! The optimizer's kernels against `reference::optimizer`.

#![cfg(feature = "cuda")]

mod devices;

use devices::{again_on_a_gpu, device, other_schedules};
use effnetv2::Error;
use effnetv2::device::Device;
use effnetv2::device::cudarc::driver::{CudaSlice, CudaView, CudaViewMut};
use effnetv2::kernels::optimizer::{Buffers, CopyElement, Optimizer, Scalars, WorkingCopy};
use effnetv2::optimizer::{Rule, Step, gradient_scale};
use effnetv2::random::{Purpose, Stream};
use effnetv2::reference::optimizer as reference;
use half::{bf16, f16};
use proptest::prelude::*;
use std::ops::Range;
use std::slice;

const SGD: Rule = Rule::Sgd { momentum: 0.9, nesterov: false };
const RULES: [Rule; 4] = [
    Rule::PAPER,
    SGD,
    Rule::Sgd { momentum: 0.9, nesterov: true },
    Rule::AdamW { beta1: 0.9, beta2: 0.999, epsilon: 1e-8 },
];
const STEP: Step = Step { number: 0, learning_rate: 0.25, weight_decay: 0.5, gradient_scale: 1.0 };
/// Around a block's 2048 elements and a pack's 4.
const LENGTHS: [usize; 9] = [1, 3, 4, 1023, 2047, 2048, 2049, 4096, 5003];

/// The state that a step moves.
#[derive(Clone, Debug, PartialEq)]
struct State<F> {
    parameters: Vec<F>,
    slots: Vec<Vec<F>>,
    average: Option<Vec<F>>,
}

impl<F: Copy> State<F> {
    fn map<G>(&self, f: impl Fn(F) -> G + Copy) -> State<G> {
        let each = |values: &Vec<F>| values.iter().map(|&value| f(value)).collect::<Vec<G>>();
        State {
            parameters: each(&self.parameters),
            slots: self.slots.iter().map(each).collect(),
            average: self.average.as_ref().map(each),
        }
    }

    fn all(&self) -> impl Iterator<Item = &F> {
        self.parameters.iter().chain(self.slots.iter().flatten()).chain(self.average.iter().flatten())
    }
}

/// What becomes of the new parameters in the working copy, as bits.
#[derive(Clone, Copy, Debug, PartialEq)]
enum CopyKind {
    None,
    F16,
    Bf16,
}

/// Elements before and behind a buffer that nothing may touch: 16 bytes keep it aligned.
const MARGIN: usize = 8;
const UNTOUCHED: f32 = -123.5;

/// A buffer with margins.
fn upload(device: &Device, values: &[f32]) -> CudaSlice<f32> {
    let margin = [UNTOUCHED; MARGIN];
    device.upload(&[&margin[..], values, &margin[..]].concat()).unwrap()
}

fn inner<T>(slice: &mut CudaSlice<T>) -> CudaViewMut<'_, T> {
    let end = slice.len() - MARGIN;
    slice.slice_mut(MARGIN..end)
}

fn download(device: &Device, slice: &CudaSlice<f32>) -> Vec<f32> {
    let values = device.read(slice).unwrap();
    let end = values.len() - MARGIN;
    assert!(values[..MARGIN].iter().chain(&values[end..]).all(|&v| v == UNTOUCHED), "a margin was written");
    values[MARGIN..end].to_vec()
}

/// One step on the device: the new state and the bits of the working copy.
fn step_on_device(
    device: &Device,
    rule: Rule,
    scalars: &Scalars,
    kernels: &[Range<usize>],
    before: &State<f32>,
    gradients: &[f32],
    copy: CopyKind,
) -> (State<f32>, Vec<u16>) {
    let stream = device.compute();
    let n = before.parameters.len();
    let mut plan = Optimizer::plan(device, rule, n, kernels).unwrap();
    let mut parameters = upload(device, &before.parameters);
    let gradients = device.upload(gradients).unwrap();
    let mut slots: Vec<_> = before.slots.iter().map(|slot| upload(device, slot)).collect();
    let mut average = before.average.as_ref().map(|average| upload(device, average));
    let (mut half, mut brain) = (device.zeros::<f16>(n).unwrap(), device.zeros::<bf16>(n).unwrap());
    plan.begin_step(stream, scalars).unwrap();
    {
        let (mut half, mut brain) = (half.as_view_mut(), brain.as_view_mut());
        let mut average = average.as_mut().map(inner);
        let buffers = Buffers {
            parameters: &mut inner(&mut parameters),
            gradients: &gradients.as_view(),
            slots: &mut slots.iter_mut().map(inner).collect::<Vec<_>>(),
            average: average.as_mut(),
            copy: match copy {
                CopyKind::None => WorkingCopy::None,
                CopyKind::F16 => WorkingCopy::F16(&mut half),
                CopyKind::Bf16 => WorkingCopy::Bf16(&mut brain),
            },
        };
        plan.update(stream, buffers).unwrap();
    }
    let bits = match copy {
        CopyKind::None => Vec::new(),
        CopyKind::F16 => device.read(&half).unwrap().into_iter().map(f16::to_bits).collect(),
        CopyKind::Bf16 => device.read(&brain).unwrap().into_iter().map(bf16::to_bits).collect(),
    };
    let after = State {
        parameters: download(device, &parameters),
        slots: slots.iter().map(|slot| download(device, slot)).collect(),
        average: average.map(|average| download(device, &average)),
    };
    (after, bits)
}

fn step_on_reference<F: num_traits::Float + Send + Sync>(
    rule: Rule,
    scalars: &Scalars,
    kernels: &[Range<usize>],
    before: &State<F>,
    gradients: &[F],
) -> State<F> {
    let mut after = before.clone();
    reference::update(rule, &scalars.step, kernels, &mut after.parameters, gradients, &mut after.slots)
        .unwrap();
    if let Some(average) = &mut after.average {
        reference::update_average(average, &after.parameters, scalars.ema_decay).unwrap();
    }
    after
}

/// A state in which nothing is close to a division by zero: mean squares of 0.1 to 1.
fn random_state(rule: Rule, n: usize, average: bool, stream: &mut Stream) -> State<f32> {
    let mut draw = |low, high| (0..n).map(|_| stream.uniform_in(low, high) as f32).collect::<Vec<_>>();
    let slots = rule.slots().iter();
    State {
        slots: slots
            .map(|slot| match slot.name {
                "mean_square" | "second_moment" => draw(0.1, 1.0),
                _ => draw(-0.1, 0.1),
            })
            .collect(),
        parameters: draw(-2.0, 2.0),
        average: average.then(|| draw(-2.0, 2.0)),
    }
}

fn any_rule() -> impl Strategy<Value = Rule> {
    prop::sample::select(RULES.to_vec())
}

fn any_copy() -> impl Strategy<Value = CopyKind> {
    prop::sample::select(vec![CopyKind::None, CopyKind::F16, CopyKind::Bf16])
}

/// Sorted, disjoint ranges below n, empty ones among them.
fn any_kernels(n: usize) -> impl Strategy<Value = Vec<Range<usize>>> {
    prop::collection::vec(0..=n, 0..12).prop_map(|mut borders| {
        borders.sort_unstable();
        borders.chunks_exact(2).map(|pair| pair[0]..pair[1]).collect()
    })
}

proptest! {
    #![proptest_config(devices::cases(48))]

    /// Rounding alone separates the two. An element takes at most 16 roundings of ε/2 (constants and scalars included),
    /// each of a quantity that the same step with every sign positive bounds; the divisors differ by less than a tenth
    /// between the two, as mean squares are at least 0.1 and gradients at most 0.1.
    #[test]
    fn an_update_is_the_reference_s(
        (n, kernels) in prop_oneof![prop::sample::select(LENGTHS.to_vec()), 1_usize..6000]
            .prop_flat_map(|n| (Just(n), any_kernels(n))),
        rule in any_rule(),
        copy in any_copy(),
        average in any::<bool>(),
        seed in any::<u64>(),
        number in 0_u64..1000,
    ) {
        let Some(device) = device() else { return Ok(()) };
        let mut stream = Stream::new(seed, 0, 0, Purpose::Init);
        let before = random_state(rule, n, average, &mut stream);
        let gradients: Vec<f32> = (0..n).map(|_| stream.uniform_in(-0.2, 0.2) as f32).collect();
        let step = Step { number, learning_rate: 0.05, weight_decay: 0.01, gradient_scale: 0.5 };
        let scalars = Scalars { ema_decay: 0.99, ..Scalars::plain(step) };

        let (after, copied) = step_on_device(&device, rule, &scalars, &kernels, &before, &gradients, copy);
        let wide: Vec<f64> = gradients.iter().map(|&g| g.into()).collect();
        let expected = step_on_reference(rule, &scalars, &kernels, &before.map(f64::from), &wide);

        // The parameters move against the gradient: |w| and the way they go.
        let positive: Vec<f64> = wide.iter().map(|g| g.abs()).collect();
        let start = before.map(|value| f64::from(value).abs());
        let mut bound = step_on_reference(rule, &scalars, &kernels, &start, &positive);
        for (bound, start) in bound.parameters.iter_mut().zip(&start.parameters) {
            *bound = 2.0 * start - *bound;
        }
        if let (Some(average), Some(start)) = (&mut bound.average, &start.average) {
            for ((average, start), w) in average.iter_mut().zip(start).zip(&bound.parameters) {
                *average = start + w;
            }
        }
        let epsilon = f64::from(f32::EPSILON);
        for ((i, &actual), (&expected, &bound)) in after.all().enumerate().zip(expected.all().zip(bound.all())) {
            let tolerance = 1.1 * 8.0 * epsilon * bound;
            let error = (f64::from(actual) - expected).abs();
            prop_assert!(error <= tolerance, "{rule:?} element {i}: {actual} instead of {expected}, {error:e}");
        }
        let rounded: Vec<u16> = match copy {
            CopyKind::None => Vec::new(),
            CopyKind::F16 => after.parameters.iter().map(|&w| f16::from_f32(w).to_bits()).collect(),
            CopyKind::Bf16 => after.parameters.iter().map(|&w| bf16::from_f32(w).to_bits()).collect(),
        };
        prop_assert!(copied == rounded, "the working copy is not the rounded parameters");
    }

    /// Sums of squares in f64: n additions of positive numbers, each within half an ulp of the total.
    #[test]
    fn a_norm_is_the_reference_s(n in prop_oneof![1_usize..3000, 16_300_usize..16_500, 32_700_usize..50_000], seed in any::<u64>()) {
        let Some(device) = device() else { return Ok(()) };
        let mut stream = Stream::new(seed, 0, 0, Purpose::Init);
        let gradients: Vec<f32> = (0..n).map(|_| stream.uniform_in(-3.0, 3.0) as f32).collect();
        let (actual, expected) = (norm(&device, &gradients), reference::gradient_norm(&gradients));
        prop_assert!((actual - expected).abs() <= n as f64 * f64::EPSILON * expected, "{actual} instead of {expected}");
    }
}

fn norm(device: &Device, gradients: &[f32]) -> f64 {
    let mut plan = Optimizer::plan(device, Rule::PAPER, gradients.len(), &[]).unwrap();
    plan.norm(device.compute(), &device.upload(gradients).unwrap().as_view()).unwrap();
    plan.read_norm(device.compute()).unwrap()
}

/// Values and constants of few bits, so that every operation is exact and so must the result be, whatever is contracted
/// or reordered.
#[test]
fn steps_without_rounding_are_exact() {
    let Some(device) = device() else { return };
    let sgd = |nesterov| Rule::Sgd { momentum: 0.5, nesterov };
    // √(½·4 + ½·2² + 5) = 3 divides a learning rate of 3; √(2·2) + 2 = 4 divides AdamW's.
    let rms = Rule::RmsPropTf { rho: 0.5, momentum: 0.5, epsilon: 5.0 };
    let adam = Rule::AdamW { beta1: 0.5, beta2: 0.5, epsilon: 2.0 };
    let cases: [(Rule, f64, f64, [f32; 2]); 4] = [
        (sgd(false), 0.25, 0.5, [3.0, 0.0]),
        (sgd(true), 0.25, 0.5, [-5.0, 0.0]),
        (rms, 3.0, 0.0, [4.0, 7.0]),
        (adam, 0.5, 0.5, [0.0, 0.0]),
    ];
    for (rule, learning_rate, weight_decay, initial) in cases {
        for n in LENGTHS {
            let step = Step { learning_rate, weight_decay, gradient_scale: 0.5, ..STEP };
            let scalars = Scalars { ema_decay: 0.5, ..Scalars::plain(step) };
            let kernels = [0..n / 3, n / 2..n];
            let before = State {
                parameters: (0..n).map(|i| (i % 17) as f32 - 8.0).collect(),
                slots: (0..rule.slots().len()).map(|slot| vec![initial[slot]; n]).collect(),
                average: Some((0..n).map(|i| (i % 5) as f32).collect()),
            };
            let gradients: Vec<f32> = (0..n).map(|i| if i % 3 == 0 { 4.0 } else { -4.0 }).collect();
            let expected = step_on_reference(rule, &scalars, &kernels, &before, &gradients);
            for copy in [CopyKind::None, CopyKind::F16, CopyKind::Bf16] {
                let (after, _) = step_on_device(&device, rule, &scalars, &kernels, &before, &gradients, copy);
                assert!(after == expected, "{rule:?}, {n} parameters, copy {copy:?}");
                assert!(after.parameters != before.parameters);
            }
        }
    }
}

/// The host device runs blocks and warps in another order for each seed.
#[test]
fn results_repeat_bit_for_bit() {
    let Some(device) = device() else { return };
    let n = 40_003;
    let run = |seed| {
        if let Some(control) = device.host_control() {
            control.shuffle(seed);
        }
        let mut stream = Stream::new(5, 0, 0, Purpose::Init);
        let gradients: Vec<f32> = (0..n).map(|_| stream.uniform_in(-1.0, 1.0) as f32).collect();
        let states: Vec<_> = RULES
            .map(|rule| {
                let before = random_state(rule, n, true, &mut Stream::new(6, 0, 0, Purpose::Init));
                let scalars = Scalars { ema_decay: 0.9, ..Scalars::plain(STEP) };
                step_on_device(
                    &device,
                    rule,
                    &scalars,
                    slice::from_ref(&(7..n / 2)),
                    &before,
                    &gradients,
                    CopyKind::Bf16,
                )
            })
            .into();
        (states, norm(&device, &gradients).to_bits())
    };
    let first = run(0);
    for seed in other_schedules() {
        assert!(first == run(seed), "schedule {seed}");
    }
}

#[test]
fn norms_of_integers_are_exact() {
    let Some(device) = device() else { return };
    assert_eq!(norm(&device, &[3.0, -4.0]), 5.0);
    assert_eq!(norm(&device, &vec![0.5; 65_536]), 128.0);
    // In f32 the squares of the ones would vanish beside 2²⁶, and squares of 10³⁰ overflow.
    let mut gradients = vec![1.0_f32; 20_000];
    gradients[17_000] = 8192.0;
    assert_eq!(norm(&device, &gradients), (8192.0_f64 * 8192.0 + 19_999.0).sqrt());
    assert_eq!(norm(&device, &[3e30, 4e30]) as f32, 5e30);
}

#[test]
fn one_bad_gradient_is_found_anywhere() {
    let Some(device) = device() else { return };
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        for place in [0, 16_383, 16_384, 20_002] {
            let mut gradients = vec![1.0_f32; 20_003];
            assert!(norm(&device, &gradients).is_finite());
            gradients[place] = bad;
            assert!(!norm(&device, &gradients).is_finite(), "{bad} at {place}");
        }
    }
}

/// The norm of 2500 gradients of 4 is 200.
#[test]
fn the_device_unscales_and_clips_as_the_host_would() {
    let Some(device) = device() else { return };
    let stream = device.compute();
    for (loss_scale, max_norm) in
        [(1.0, None), (8.0, None), (8.0, Some(50.0)), (8.0, Some(1.0)), (1.0, Some(0.5))]
    {
        let n = 2500;
        let mut plan = Optimizer::plan(&device, SGD, n, &[]).unwrap();
        let (mut w, gradients) = (device.zeros::<f32>(n).unwrap(), device.upload(&vec![4.0_f32; n]).unwrap());
        let mut slots = plan.initial_slots().unwrap();
        // A scale that only the norm can put right.
        let step = Step { gradient_scale: 1e3, learning_rate: 1.0, weight_decay: 0.0, number: 0 };
        plan.begin_step(stream, &Scalars { loss_scale, max_norm, ..Scalars::plain(step) }).unwrap();
        plan.norm_and_clip(stream, &gradients.as_view()).unwrap();
        let buffers = Buffers {
            parameters: &mut w.as_view_mut(),
            gradients: &gradients.as_view(),
            slots: &mut slots.iter_mut().map(CudaSlice::as_view_mut).collect::<Vec<_>>(),
            average: None,
            copy: WorkingCopy::None,
        };
        plan.update(stream, buffers).unwrap();
        let expected =
            -4.0 * gradient_scale(plan.read_norm(stream).unwrap(), loss_scale, max_norm).unwrap() as f32;
        assert_eq!(device.read(&w).unwrap(), vec![expected; n], "scale {loss_scale}, limit {max_norm:?}");
    }
}

#[test]
fn a_step_with_a_bad_gradient_changes_nothing() {
    let Some(device) = device() else { return };
    let stream = device.compute();
    let n = 3000;
    for bad in [f32::INFINITY, f32::NAN] {
        let mut gradients = vec![1.0_f32; n];
        gradients[2999] = bad;
        let gradients = device.upload(&gradients).unwrap();
        let mut plan = Optimizer::plan(&device, SGD, n, slice::from_ref(&(0..n))).unwrap();
        let mut buffers: [CudaSlice<f32>; 3] =
            std::array::from_fn(|i| device.upload(&vec![i as f32; n]).unwrap());
        plan.begin_step(stream, &Scalars { max_norm: Some(1.0), ..Scalars::plain(STEP) }).unwrap();
        plan.norm_and_clip(stream, &gradients.as_view()).unwrap();
        {
            let [w, slot, average] = &mut buffers;
            let update = Buffers {
                parameters: &mut w.as_view_mut(),
                gradients: &gradients.as_view(),
                slots: &mut [slot.as_view_mut()],
                average: Some(&mut average.as_view_mut()),
                copy: WorkingCopy::None,
            };
            plan.update(stream, update).unwrap();
            plan.update_average(stream, &mut average.as_view_mut(), &w.as_view()).unwrap();
        }
        for (i, buffer) in buffers.iter().enumerate() {
            assert_eq!(device.read(buffer).unwrap(), vec![i as f32; n]);
        }
    }
}

/// 1 + ½·(3 − 1) = 2, whatever the length, and independent of the plan's.
#[test]
fn averages_of_other_buffers_move() {
    let Some(device) = device() else { return };
    let stream = device.compute();
    let mut plan = Optimizer::plan(&device, Rule::PAPER, 5, &[]).unwrap();
    plan.begin_step(stream, &Scalars { ema_decay: 0.5, ..Scalars::plain(STEP) }).unwrap();
    for n in LENGTHS {
        let mut average = upload(&device, &vec![1.0; n]);
        let values = device.upload(&vec![3.0_f32; n]).unwrap();
        plan.update_average(stream, &mut inner(&mut average), &values.as_view()).unwrap();
        assert_eq!(download(&device, &average), vec![2.0; n]);
    }
}

fn cast<T: CopyElement>(device: &Device, plan: &Optimizer, values: &CudaView<'_, f32>) -> Vec<T> {
    let mut copy = device.zeros::<T>(values.len()).unwrap();
    plan.cast(device.compute(), values, &mut copy.as_view_mut()).unwrap();
    device.read(&copy).unwrap()
}

/// Ties, numbers that become subnormal, vanish or overflow, and all kinds of length.
#[test]
fn the_working_copy_is_rounded_to_nearest_even() {
    let Some(device) = device() else { return };
    let plan = Optimizer::plan(&device, Rule::PAPER, 1, &[]).unwrap();
    let mut values =
        vec![0.0, -0.0, 1.0, f32::INFINITY, f32::NEG_INFINITY, f32::MAX, 65_504.0, 65_519.0, 65_520.0];
    values.extend([1.0 + 2.0_f32.powi(-8), 1.0 + 3.0 * 2.0_f32.powi(-8), 1.0 + 2.0_f32.powi(-11)]);
    values.extend([6e-8, 3e-8, 2.9e-8, 1e-40, f32::MIN_POSITIVE]);
    let mut stream = Stream::new(1, 0, 0, Purpose::Init);
    values.extend((0..5000).map(|_| {
        let magnitude = stream.uniform_in(-20.0, 20.0).exp2();
        (magnitude * stream.uniform_in(-1.0, 1.0)) as f32
    }));
    for n in LENGTHS.into_iter().chain([values.len()]) {
        let part = device.upload(&values[..n.min(values.len())]).unwrap();
        let expected = &values[..part.len()];
        let half: Vec<u16> =
            cast::<f16>(&device, &plan, &part.as_view()).iter().map(|x| x.to_bits()).collect();
        assert_eq!(half, expected.iter().map(|&x| f16::from_f32(x).to_bits()).collect::<Vec<_>>());
        let brain: Vec<u16> =
            cast::<bf16>(&device, &plan, &part.as_view()).iter().map(|x| x.to_bits()).collect();
        assert_eq!(brain, expected.iter().map(|&x| bf16::from_f32(x).to_bits()).collect::<Vec<_>>());
    }
    let nan = device.upload(&[f32::NAN; 9]).unwrap();
    assert!(cast::<f16>(&device, &plan, &nan.as_view()).iter().all(|x| x.is_nan()));
    assert!(cast::<bf16>(&device, &plan, &nan.as_view()).iter().all(|x| x.is_nan()));
}

#[test]
fn plans_that_cannot_be_are_refused() {
    let Some(device) = device() else { return };
    let plan = |rule, n, kernels: &[Range<usize>]| {
        Optimizer::plan(&device, rule, n, kernels).map(|_| ()).map_err(|error| error.to_string())
    };
    let message = |result: Result<(), String>| result.unwrap_err();
    assert!(message(plan(Rule::PAPER, 0, &[])).contains("0 parameters"));
    assert!(message(plan(Rule::PAPER, 1 << 31, &[])).contains("2147483648 parameters; 1 to 2147483647"));
    assert!(message(plan(Rule::PAPER, 8, slice::from_ref(&(4..9)))).contains("4..9"));
    assert!(message(plan(Rule::PAPER, 8, &[4..8, 0..4])).contains("0..4"));
    assert!(message(plan(Rule::PAPER, 8, &[0..5, 4..8])).contains("4..8"));
    let bad = Rule::Sgd { momentum: 1.0, nesterov: false };
    assert!(message(plan(bad, 8, &[])).starts_with("optimizer.momentum"));
    plan(Rule::PAPER, 8, &[0..4, 4..4, 4..8]).unwrap();
}

/// Every misuse is found before the launch.
#[test]
fn buffers_that_do_not_fit_are_refused() {
    let Some(device) = device() else { return };
    let stream = device.compute();
    let n = 64;
    let mut plan = Optimizer::plan(&device, SGD, n, &[]).unwrap();
    plan.begin_step(stream, &Scalars::plain(STEP)).unwrap();
    let mut buffers: [CudaSlice<f32>; 4] = std::array::from_fn(|_| device.upload(&vec![1.0; 2 * n]).unwrap());
    let mut try_update = |ranges: [Range<usize>; 4], slots: usize| {
        let [w, g, slot, average] = &mut buffers;
        let (mut first, mut second) = slot.split_at_mut(n);
        let mut slot_views = vec![first.slice_mut(ranges[2].clone()), second.slice_mut(0..n)];
        slot_views.truncate(slots);
        let update = Buffers {
            parameters: &mut w.slice_mut(ranges[0].clone()),
            gradients: &g.slice(ranges[1].clone()),
            slots: &mut slot_views,
            average: Some(&mut average.slice_mut(ranges[3].clone())),
            copy: WorkingCopy::None,
        };
        plan.update(stream, update).map_err(|error| match error {
            Error::Shape { .. } => error.to_string(),
            error => panic!("{error}"),
        })
    };
    let fits = || 0..n;
    try_update([fits(), fits(), fits(), fits()], 1).unwrap();
    let mut refused = |ranges, slots| try_update(ranges, slots).unwrap_err();
    assert!(refused([0..n - 1, fits(), fits(), fits()], 1).contains("parameters: 63 elements, where 64"));
    assert!(refused([fits(), 0..n + 1, fits(), fits()], 1).contains("gradients: 65 elements"));
    assert!(refused([fits(), fits(), 0..n - 4, fits()], 1).contains("momentum: 60 elements"));
    assert!(refused([fits(), fits(), fits(), 0..0], 1).contains("average: 0 elements"));
    assert!(refused([fits(), fits(), fits(), fits()], 2).contains("keeps 1 slots, 2 were given"));
    assert!(refused([fits(), fits(), fits(), fits()], 0).contains("keeps 1 slots, 0 were given"));
    assert!(refused([1..n + 1, fits(), fits(), fits()], 1).contains("parameters: begins 4 bytes after"));
    assert!(refused([fits(), 2..n + 2, fits(), fits()], 1).contains("gradients: begins 8 bytes after"));
}

/// Two slices on one memory, as a program that uses raw pointers may have.
#[test]
fn overlapping_buffers_are_refused() {
    let Some(device) = device() else { return };
    let stream = device.compute();
    let n = 64;
    let mut plan = Optimizer::plan(&device, SGD, n, &[]).unwrap();
    let memory = device.upload(&vec![1.0_f32; 4 * n]).unwrap().leak();
    let slice = |begin: usize, length: usize| {
        // SAFETY: within the memory, which is given back at the end.
        unsafe { stream.upgrade_device_ptr::<f32>(memory + 4 * begin as u64, length) }
    };
    let mut message = |mut w: CudaSlice<f32>, g: CudaSlice<f32>, mut slot: CudaSlice<f32>| {
        let update = Buffers {
            parameters: &mut w.as_view_mut(),
            gradients: &g.as_view(),
            slots: &mut [slot.as_view_mut()],
            average: None,
            copy: WorkingCopy::None,
        };
        let result = plan.update(stream, update);
        for slice in [w, g, slot] {
            slice.leak();
        }
        result.map_err(|error| error.to_string())
    };
    let overlap = |result: Result<(), String>, names: &str| {
        let message = result.unwrap_err();
        assert!(message.contains(names), "{message}");
    };
    overlap(message(slice(0, n), slice(60, n), slice(2 * n, n)), "gradients and parameters overlap");
    overlap(message(slice(0, n), slice(2 * n, n), slice(0, n)), "momentum and parameters overlap");
    overlap(message(slice(0, n), slice(2 * n, n), slice(2 * n, n)), "momentum and gradients overlap");
    message(slice(0, n), slice(n, n), slice(2 * n, n)).unwrap();
    drop(slice(0, 4 * n));
}

#[test]
fn the_same_on_a_gpu() {
    again_on_a_gpu("the_same_on_a_gpu");
}
