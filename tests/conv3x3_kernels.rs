//! The kernels of the dense 3×3 convolution against `reference::conv3x3`.

#![cfg(feature = "cuda")]

#[path = "devices/dense.rs"]
mod dense;
mod devices;
#[path = "devices/elements.rs"]
#[allow(dead_code, reason = "raw tensors with a normalisation to apply are not read by a dense convolution")]
mod elements;

use dense::{Case, Norm, all_close, all_exact, dense, dot, roundings};
use devices::{again_on_a_gpu, device, other_schedules};
use effnetv2::Error;
use effnetv2::backend::Activation;
use effnetv2::device::Device;
use effnetv2::kernels::conv3x3::{Conv3x3, Conv3x3Shape, FAMILY};
use effnetv2::kernels::tuning::{Choice, Choices, Launch, Way};
use effnetv2::kernels::{Arrival, GradientOutput, GradientView, Input, Output, OutputKind, Workspace};
use effnetv2::tensor::{Conv, ConvKind, Dtype, Padding, Real, Shape};
use elements::{EPSILON, Sample, unwritten, wide, written};
use half::{bf16, f16};
use proptest::prelude::*;
use std::collections::BTreeSet;

type Images = (usize, usize, usize);

/// What rounding both factors of a product to the 11 significant bits of tf32 may cost of it.
const TF32: f64 = 2.0 / 2048.0 + 1.0 / (2048.0 * 2048.0);

/// Everything the device computes.
#[derive(Clone, Debug, PartialEq)]
struct Outcome<T> {
    y: Vec<T>,
    /// Of batch norm, if moments were asked for.
    norm: Vec<f32>,
    dx: Vec<T>,
    dweight: Vec<f32>,
}

/// What becomes of an output.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Epilogue {
    Plain,
    Moments,
    Folded(Activation),
}

/// With what is added to outputs or not.
fn on_device<T: Sample>(
    device: &Device,
    dtype: Dtype,
    case: &Case<T>,
    choices: Choices,
    epilogue: Epilogue,
    skips: bool,
) -> Outcome<T> {
    let stream = device.compute();
    let plan = Conv3x3::<T>::plan_with(device, &case.conv, case.x_shape, dtype, choices).unwrap();
    let mut workspace = Workspace::new(device, plan.workspace_floats()).unwrap();
    let (x, weight) = (device.upload(&case.x).unwrap(), device.upload(&case.weight).unwrap());
    let (x, weight) = (x.as_view(), weight.as_view());
    let length = case.y_shape.elements();
    let mut y = unwritten::<T>(device, length);
    let mut norm = Norm::random(device, case.conv.outputs, case.x_shape.h as u64);
    {
        let mut fprop = |output: Output<'_, '_, T>| {
            let y = &mut y.slice_mut(..length);
            plan.fprop(stream, Input::Plain(&x), &weight, y, output, &mut workspace).unwrap();
        };
        match epilogue {
            Epilogue::Plain => fprop(Output::Plain),
            Epilogue::Moments => norm.with(|statistics| fprop(Output::Moments(statistics))),
            Epilogue::Folded(act) => {
                let (bias, skip) = (device.upload(&case.bias).unwrap(), device.upload(&case.skip).unwrap());
                let (bias, skip) = (bias.as_view(), skip.as_view());
                fprop(Output::Folded { bias: &bias, act, skip: skips.then_some(&skip) });
            }
        }
    }
    let y = written(device, &y);
    let norm = if epilogue == Epilogue::Moments {
        norm.check(device, &y);
        norm.outcome(device)
    } else {
        Vec::new()
    };

    let (g, raw) = (device.upload(&case.g).unwrap(), device.upload(&case.raw).unwrap());
    let (owed, input_skip) = (device.upload(&case.owed).unwrap(), device.upload(&case.input_skip).unwrap());
    let (g, raw, owed, input_skip) = (g.as_view(), raw.as_view(), owed.as_view(), input_skip.as_view());
    let gradient = GradientView { g: &g, y: &raw, owed: &owed, arrival: Arrival::Alone };
    let length = case.x_shape.elements();
    let mut dx = unwritten::<T>(device, length);
    let output = GradientOutput::Plain { skip: skips.then_some(&input_skip) };
    plan.dgrad(stream, gradient, &weight, &mut dx.slice_mut(..length), output).unwrap();
    let mut dweight = unwritten::<f32>(device, case.before.len());
    {
        let mut view = dweight.slice_mut(..case.before.len());
        effnetv2::device::write(stream, &case.before, &mut view).unwrap();
        plan.wgrad(stream, Input::Plain(&x), gradient, &mut view, &mut workspace).unwrap();
    }
    Outcome { y, norm, dx: written(device, &dx), dweight: written(device, &dweight) }
}

/// y and its bound as `epilogue` leaves them.
fn expected_output<T: Sample>(case: &Case<T>, epilogue: Epilogue, skips: bool) -> (Vec<f64>, Vec<f64>) {
    let (y, size) = case.fprop();
    let Epilogue::Folded(act) = epilogue else { return (y.into_vec(), size.into_vec()) };
    let bias = |i: usize| f64::from(case.bias[i % case.conv.outputs]);
    let added = |i: usize| if skips { case.skip[i].wide() } else { 0.0 };
    let apply = |v: f64| if act == Activation::Silu { v.silu() } else { v };
    let y = y.data().iter().enumerate().map(|(i, y)| apply(y + bias(i)) + added(i)).collect();
    // SiLU's slope is at most 1.1, its own error a share of what it is taken of.
    let bound = |(i, s): (usize, &f64)| 1.1 * (s + bias(i).abs()) + added(i).abs();
    (y, size.data().iter().enumerate().map(bound).collect())
}

fn check<T: Sample>(
    device: &Device,
    dtype: Dtype,
    case: &Case<T>,
    choices: Choices,
    epilogue: Epilogue,
    seed: u64,
) {
    let conv = case.conv;
    let skips = !seed.is_multiple_of(3);
    // A single value has no moments.
    let alone = case.y_shape.pixels() == 1 && epilogue == Epilogue::Moments;
    let epilogue = if alone { Epilogue::Plain } else { epilogue };
    let actual = on_device(device, dtype, case, choices, epilogue, skips);
    let (y, size) = expected_output(case, epilogue, skips);
    let what = format!("{dtype} of {conv:?} for {}, {epilogue:?}, {choices:?}", case.x_shape);
    let of_factors = if dtype == Dtype::Tf32 { TF32 } else { 0.0 };
    all_close(
        &actual.y,
        &y,
        &size,
        roundings(9 * conv.inputs) + 8.0 * EPSILON + of_factors,
        &format!("{what}: y"),
    );
    // dy is rounded to the type before tensor cores multiply it.
    let of_dy = 4.0 * EPSILON + T::UNIT * (1.0 + 4.0 * EPSILON) + of_factors;
    let (dx, size) = case.dgrad();
    let added = |i: usize| if skips { case.input_skip[i].wide() } else { 0.0 };
    let dx: Vec<f64> = dx.data().iter().enumerate().map(|(i, v)| v + added(i)).collect();
    let size: Vec<f64> = size.data().iter().enumerate().map(|(i, v)| v + added(i).abs()).collect();
    all_close(&actual.dx, &dx, &size, roundings(9 * conv.outputs) + of_dy, &format!("{what}: dx"));
    let (dweight, size) = case.wgrad();
    let share = roundings(case.y_shape.pixels()) + of_dy;
    all_close(&actual.dweight, &dweight, &size, share, &format!("{what}: dweight"));
}

/// Images, inputs and outputs: one pixel; sides below the kernel; one row and one column; odd and even sides; rows and columns
/// of tiles begun and full; several splits of the pixels.
const SHAPES: [(Images, usize, usize); 11] = [
    ((1, 1, 1), 8, 8),
    ((3, 1, 1), 16, 72),
    ((2, 2, 2), 24, 24),
    ((1, 3, 5), 48, 136),
    ((2, 1, 19), 8, 64),
    ((1, 23, 1), 40, 16),
    ((1, 16, 16), 24, 48),
    ((2, 9, 15), 8, 24),
    ((5, 4, 3), 200, 8),
    ((1, 5, 6), 8, 200),
    ((1, 37, 41), 8, 8),
];

/// The same where f16 and bf16 with stride 1 are computed on spatial tiles: chunks of channels begun, half and full; whole
/// tiles, the largest halo, tiles beyond the right and the lower edge, several images; and so many columns that groups and
/// fragments are begun.
const TILED: [(Images, usize, usize); 11] = [
    ((1, 16, 16), 8, 24),
    ((2, 16, 16), 48, 64),
    ((1, 14, 22), 64, 16),
    ((1, 2, 94), 24, 8),
    ((1, 90, 2), 8, 48),
    ((3, 13, 25), 24, 24),
    ((1, 14, 37), 16, 72),
    ((1, 25, 18), 72, 40),
    ((2, 12, 12), 200, 32),
    ((1, 19, 20), 48, 192),
    ((1, 13, 19), 192, 48),
];

/// The same where their gradient with stride 2 is computed on tiles of cells, of both sizes.
const CELLED: [(Images, usize, usize); 9] = [
    ((1, 16, 16), 8, 8),
    ((2, 15, 17), 24, 48),
    ((1, 32, 16), 48, 24),
    ((1, 16, 33), 64, 40),
    ((3, 31, 15), 16, 72),
    ((1, 75, 9), 48, 64),
    ((1, 3, 96), 40, 16),
    ((1, 40, 37), 24, 96),
    ((1, 19, 22), 48, 192),
];

/// The kernels of fprop and dgrad in f16, each without the ending of its type.
fn ways(conv: &Conv, (n, h, w): Images) -> [String; 2] {
    let shape = Conv3x3Shape::new(conv, Shape::new(n, h, w, conv.inputs)).unwrap();
    [shape.fprop_work(Dtype::F16, OutputKind::Plain), shape.dgrad_work(Dtype::F16, false)]
        .map(|work| work.kernel.rsplit('_').nth(1).unwrap().to_owned())
}

/// What is computed on tiles, and the least image of all squares that is.
#[test]
fn tiles_are_taken_where_they_are_filled() {
    for (images, inputs, outputs) in TILED {
        let ways = ways(&dense(1, Padding::Same, inputs, outputs), images);
        assert!(ways.iter().all(|way| way.starts_with("tiles")), "{ways:?}, {images:?}");
    }
    for (images, inputs, outputs) in CELLED {
        for padding in [Padding::Same, Padding::Symmetric] {
            let [fprop, dgrad] = ways(&dense(2, padding, inputs, outputs), images);
            assert!(!fprop.starts_with("tiles") && dgrad.starts_with("cells"), "{dgrad}, {images:?}");
        }
    }
    let square = |stride, side| ways(&dense(stride, Padding::Same, 64, 64), (256, side, side));
    assert_eq!(
        (square(1, 11), square(1, 12)),
        (["narrow"; 2].map(String::from), ["tiles64"; 2].map(String::from))
    );
    assert_eq!((&*square(2, 14)[1], &*square(2, 15)[1]), ("narrow", "cells32"));
    let shape = Conv3x3Shape::new(&dense(1, Padding::Same, 64, 64), Shape::new(2, 16, 16, 64)).unwrap();
    assert!(shape.dgrad_work(Dtype::F32, false).kernel.contains("narrow"));
}

fn any_conv() -> impl Strategy<Value = (Conv, Images)> {
    let shapes = prop_oneof![
        prop::sample::select(SHAPES.to_vec()),
        prop::sample::select(TILED.to_vec()),
        prop::sample::select(CELLED.to_vec()),
        ((1_usize..3, 11_usize..40, 11_usize..40), 1_usize..7, 1_usize..7)
            .prop_map(|(images, inputs, outputs)| (images, 8 * inputs, 8 * outputs)),
        ((1_usize..4, 1_usize..14, 1_usize..14), 1_usize..8, 1_usize..10)
            .prop_map(|(images, inputs, outputs)| (images, 8 * inputs, 8 * outputs)),
    ];
    let paddings = prop::sample::select(vec![Padding::Same, Padding::Symmetric]);
    (shapes, 1_usize..3, paddings).prop_map(|((images, inputs, outputs), stride, padding)| {
        (dense(stride, padding, inputs, outputs), images)
    })
}

fn any_epilogue() -> impl Strategy<Value = Epilogue> {
    prop::sample::select(vec![
        Epilogue::Plain,
        Epilogue::Moments,
        Epilogue::Folded(Activation::Identity),
        Epilogue::Folded(Activation::Silu),
    ])
}

proptest! {
    #![proptest_config(devices::cases(20))]

    #[test]
    fn all_directions_are_the_reference_s(
        (conv, images) in any_conv(),
        epilogue in any_epilogue(),
        seed in any::<u64>(),
        dtype in prop::sample::select(vec![Dtype::F32, Dtype::Tf32, Dtype::F16, Dtype::Bf16]),
        by_warpgroups in prop::option::of(0_usize..6),
    ) {
        let Some(device) = device() else { return Ok(()) };
        let choices = match by_warpgroups {
            Some(columns) if conv.stride == 1 && device.has_wgmma() => wgmma(columns),
            _ => Choices::default(),
        };
        match dtype {
            Dtype::F32 | Dtype::Tf32 => {
                let case = Case::<f32>::random(conv, images, seed);
                check(&device, dtype, &case, Choices::default(), epilogue, seed);
            }
            Dtype::F16 => {
                check(&device, dtype, &Case::<f16>::random(conv, images, seed), choices, epilogue, seed);
            }
            Dtype::Bf16 => {
                check(&device, dtype, &Case::<bf16>::random(conv, images, seed), choices, epilogue, seed);
            }
        }
    }
}

/// One small convolution after the other, with launches of choice, until every kernel has run: what sanitizers are sure to see.
#[test]
fn every_kernel_is_the_reference_s() {
    fn check_all<T: Sample>(device: &Device, stride: usize, images: Images) {
        for turn in 0..7 {
            let conv = dense(stride, Padding::Same, [24, 32, 40][turn % 3], 72);
            let shape =
                Conv3x3Shape::new(&conv, Shape::new(images.0, images.1, images.2, conv.inputs)).unwrap();
            let choose = |launch| {
                let mut all = shape.choices(T::DTYPE, launch);
                all.retain(|choice| !choice.needs_wgmma() || device.has_wgmma());
                all[turn % all.len()]
            };
            let (fprop, dgrad) = (choose(Launch::Fprop), choose(Launch::Dgrad));
            // A layout of which a warp has all inputs.
            let part = format!("_{}_", conv.inputs);
            let layouts = [Choice::default()].into_iter().chain(shape.choices(T::DTYPE, Launch::Wgrad));
            let mut choices = layouts.map(|wgrad| Choices { fprop, dgrad, wgrad, ..Choices::default() });
            let choices = choices.find(|&choices| {
                shape.with(T::DTYPE, choices).unwrap().wgrad_work(T::DTYPE)[0].kernel.contains(&part)
            });
            let choices = choices.unwrap();
            let case = Case::<T>::random(conv, images, turn as u64);
            check(device, T::DTYPE, &case, choices, Epilogue::Moments, turn as u64);
        }
    }
    let Some(device) = device() else { return };
    device.log_launches();
    for dtype in [Dtype::F32, Dtype::Tf32] {
        let case = Case::<f32>::random(dense(1, Padding::Same, 8, 16), (1, 19, 20), 3);
        check(&device, dtype, &case, Choices::default(), Epilogue::Moments, 3);
    }
    for (stride, images) in [(1, (1, 13, 14)), (2, (1, 16, 17))] {
        check_all::<f16>(&device, stride, images);
        check_all::<bf16>(&device, stride, images);
    }
    let launched: BTreeSet<&str> = device.take_launches().iter().map(|launch| launch.kernel).collect();
    let by_warpgroups = |name: &str| name.contains("wgmma");
    let all = FAMILY.kernels.iter().map(|entry| entry.name);
    let expected = all.filter(|name| device.has_wgmma() || !by_warpgroups(name)).collect();
    assert_eq!(launched, expected);
}

/// All three directions, value for value.
fn exact<T: Sample>(device: &Device, conv: Conv, images: Images, epilogue: Epilogue, skips: bool) {
    exact_in::<T>(device, T::DTYPE, conv, images, Choices::default(), epilogue, skips);
}

/// The same, multiplied as `dtype` says, by launches of choice.
fn exact_in<T: Sample>(
    device: &Device,
    dtype: Dtype,
    conv: Conv,
    images: Images,
    choices: Choices,
    epilogue: Epilogue,
    skips: bool,
) {
    let case = Case::<T>::integers(conv, images, 7);
    let epilogue = if case.y_shape.pixels() == 1 { Epilogue::Plain } else { epilogue };
    let actual = on_device(device, dtype, &case, choices, epilogue, skips);
    let what = format!("{dtype} of {conv:?} for {}, {epilogue:?}, {choices:?}", case.x_shape);
    all_exact(&actual.y, &expected_output(&case, epilogue, skips).0, format_args!("{what}: y"));
    let dx = case.dgrad().0.into_vec();
    let added = |i: usize| if skips { case.input_skip[i].wide() } else { 0.0 };
    let dx: Vec<f64> = dx.iter().enumerate().map(|(i, v)| v + added(i)).collect();
    all_exact(&actual.dx, &dx, format_args!("{what}: dx"));
    all_exact(&actual.dweight, &case.wgrad().0, format_args!("{what}: dweight"));
}

#[test]
fn integers_are_exact() {
    let Some(device) = device() else { return };
    let mut turn = 0;
    for (images, inputs, outputs) in SHAPES {
        for stride in [1, 2] {
            for padding in [Padding::Same, Padding::Symmetric] {
                let conv = dense(stride, padding, inputs, outputs);
                let epilogue =
                    [Epilogue::Moments, Epilogue::Folded(Activation::Identity), Epilogue::Plain][turn % 3];
                match turn % 4 {
                    0 => {
                        exact::<f32>(&device, conv, images, epilogue, turn % 2 == 0);
                        let rule = Choices::default();
                        exact_in::<f32>(&device, Dtype::Tf32, conv, images, rule, epilogue, turn % 2 == 0);
                    }
                    1 => exact::<f16>(&device, conv, images, epilogue, turn % 2 == 0),
                    _ => exact::<bf16>(&device, conv, images, epilogue, turn % 2 == 0),
                }
                turn += 1;
            }
            turn += 1;
        }
    }
}

#[test]
fn integers_are_exact_on_tiles() {
    let Some(device) = device() else { return };
    let epilogues = [Epilogue::Moments, Epilogue::Plain, Epilogue::Folded(Activation::Identity)];
    for (turn, (images, inputs, outputs)) in TILED.into_iter().enumerate() {
        let conv = dense(1, Padding::Same, inputs, outputs);
        match turn % 2 {
            0 => exact::<f16>(&device, conv, images, epilogues[turn % 3], turn % 4 == 0),
            _ => exact::<bf16>(&device, conv, images, epilogues[turn % 3], turn % 4 == 1),
        }
    }
    let paddings = [Padding::Same, Padding::Symmetric];
    for (turn, (images, inputs, outputs)) in CELLED.into_iter().enumerate() {
        let conv = dense(2, paddings[turn % 2], inputs, outputs);
        match turn % 4 {
            0 | 3 => exact::<f16>(&device, conv, images, Epilogue::Plain, turn % 3 == 0),
            _ => exact::<bf16>(&device, conv, images, Epilogue::Plain, turn % 3 == 0),
        }
    }
}

/// Forward and backward by wgmma, with one of the pairs of columns that there are.
fn wgmma(columns: usize) -> Choices {
    let of = |columns| Choice::by(Way::Wgmma).columns(columns);
    Choices { fprop: of([64, 32][columns % 2]), dgrad: of([48, 64, 32][columns % 3]), ..Choices::default() }
}

#[test]
fn integers_are_exact_by_wgmma() {
    let Some(device) = device() else { return };
    if !device.has_wgmma() {
        let refused = Conv3x3::<f16>::plan_with(
            &device,
            &dense(1, Padding::Same, 8, 8),
            Shape::new(1, 9, 9, 8),
            Dtype::F16,
            wgmma(0),
        );
        assert!(matches!(refused, Err(Error::Shape { .. })), "{refused:?}");
        return;
    }
    let epilogues = [Epilogue::Moments, Epilogue::Plain, Epilogue::Folded(Activation::Identity)];
    // Tiles that are hardly filled, too; half a chunk and halves of the second and the third; columns of all, and more.
    let small = [SHAPES[0], SHAPES[1], SHAPES[3], SHAPES[5]];
    for (turn, (images, inputs, outputs)) in TILED[1..].iter().step_by(2).copied().chain(small).enumerate() {
        let conv = dense(1, Padding::Same, inputs, outputs);
        let (epilogue, skips) = (epilogues[turn % 3], turn % 4 == 0);
        match turn % 2 {
            0 => exact_in::<f16>(&device, Dtype::F16, conv, images, wgmma(turn), epilogue, skips),
            _ => exact_in::<bf16>(&device, Dtype::Bf16, conv, images, wgmma(turn), epilogue, skips),
        }
    }
    // Two tiles of a block.
    let (conv, images, choices) = (dense(1, Padding::Same, 8, 8), (600, 3, 3), wgmma(5));
    let shape =
        Conv3x3Shape::new(&conv, Shape::new(600, 3, 3, 8)).unwrap().with(Dtype::Bf16, choices).unwrap();
    assert_eq!(shape.fprop_work(Dtype::Bf16, OutputKind::Moments).grid[0], 300);
    exact_in::<bf16>(&device, Dtype::Bf16, conv, images, choices, Epilogue::Moments, true);
}

/// More row tiles than runs, so that a block has several and walks over the ends of images; and so many pixels that the
/// weights' gradient is added up in two rounds.
#[test]
fn walks_over_several_tiles_are_exact() {
    let Some(device) = device() else { return };
    let conv = dense(2, Padding::Same, 8, 8);
    let images = (1, 520, 514);
    let shape = Conv3x3Shape::new(&conv, Shape::new(1, 520, 514, 8)).unwrap();
    let tiles = (260_u32 * 257).div_ceil(128);
    let grid = |work: effnetv2::kernels::Work| work.grid[0];
    assert!(grid(shape.fprop_work(Dtype::Bf16, OutputKind::Moments)) < tiles);
    assert!(grid(shape.dgrad_work(Dtype::Bf16, false)) < 4 * tiles);
    assert!(grid(shape.wgrad_work(Dtype::F32).remove(0)) > 16);
    assert!(grid(shape.wgrad_work(Dtype::Bf16).remove(0)) > 8);
    exact::<f32>(&device, conv, images, Epilogue::Plain, false);
    exact::<bf16>(&device, conv, images, Epilogue::Moments, true);
}

/// The gradient of the weights in 16 bits has a kernel for each stride and number of inputs of a warp: all of them, with tiles
/// of several warps along inputs and outputs, several teams, strips entered in their middle, and several tiles.
#[test]
fn every_layout_of_strips_is_exact() {
    let Some(device) = device() else { return };
    let mut kernels = BTreeSet::new();
    for (inputs, outputs) in
        [(24, 24), (24, 208), (48, 104), (96, 40), (32, 40), (64, 72), (40, 40), (80, 72)]
    {
        for (stride, padding, images) in [
            (1, Padding::Same, (2, 21, 19)),
            (2, Padding::Same, (2, 26, 35)),
            (2, Padding::Symmetric, (1, 38, 37)),
        ] {
            let conv = dense(stride, padding, inputs, outputs);
            let (n, h, w) = images;
            let works =
                Conv3x3Shape::new(&conv, Shape::new(n, h, w, inputs)).unwrap().wgrad_work(Dtype::Bf16);
            kernels.insert(works[0].kernel.clone());
            exact::<bf16>(&device, conv, images, Epilogue::Plain, false);
        }
    }
    let names = |inputs| [1, 2].map(|stride| format!("conv3x3_wgrad_{inputs}_s{stride}_bf16"));
    assert_eq!(kernels, [24, 32, 40].into_iter().flat_map(names).collect());
}

/// The same of spatial tiles, of which there are more than 512 runs of fprop and twice 1024 blocks of dgrad.
#[test]
fn many_spatial_tiles_are_exact() {
    let Some(device) = device() else { return };
    let conv = dense(1, Padding::Same, 8, 8);
    let images = (2048, 12, 12);
    let shape = Conv3x3Shape::new(&conv, Shape::new(2048, 12, 12, 8)).unwrap();
    let grid = |work: effnetv2::kernels::Work| work.grid[0];
    assert_eq!(grid(shape.fprop_work(Dtype::Bf16, OutputKind::Moments)), 512);
    assert_eq!(grid(shape.dgrad_work(Dtype::Bf16, false)), 1024);
    exact::<bf16>(&device, conv, images, Epilogue::Moments, true);
}

/// Plans share kernels: one of a smaller halo does not take the memory away that an earlier one needs.
#[test]
fn plans_of_several_sizes_live_together() {
    let Some(device) = device() else { return };
    let conv = dense(1, Padding::Same, 8, 8);
    let plans = [(14, 22), (12, 12)].map(|(h, w)| {
        let x = Shape::new(1, h, w, 8);
        (Conv3x3::<bf16>::plan(&device, &conv, x).unwrap(), x)
    });
    let shared =
        plans.each_ref().map(|(plan, _)| plan.shape().fprop_work(Dtype::Bf16, OutputKind::Plain).shared);
    assert!(shared[0] > shared[1]);
    let mut workspace = Workspace::new(&device, 1).unwrap();
    for (plan, x) in plans {
        let (input, weight) = (vec![bf16::ONE; x.elements()], vec![bf16::ONE; conv.weights()]);
        let (input, weight) = (device.upload(&input).unwrap(), device.upload(&weight).unwrap());
        let mut y = device.zeros::<bf16>(x.elements()).unwrap();
        let (input, mut view) = (input.as_view(), y.as_view_mut());
        plan.fprop(
            device.compute(),
            Input::Plain(&input),
            &weight.as_view(),
            &mut view,
            Output::Plain,
            &mut workspace,
        )
        .unwrap();
        // A corner has four pixels of eight inputs under the kernel.
        assert_eq!(device.read(&y).unwrap()[0], bf16::from_f32(32.0));
    }
}

/// A mean hundreds of times the deviation: what `Norm::check` allows depends on the range of values alone.
#[test]
fn moments_survive_a_large_mean() {
    fn check<T: Sample>(device: &Device, stride: usize, images: Images, mean: f32) {
        let conv = dense(stride, Padding::Same, 8, 24);
        let mut case = Case::<T>::random(conv, images, 5);
        // The middle tap alone, which is never outside, and the first input.
        for (i, w) in case.weight.iter_mut().enumerate() {
            *w = T::of(if i % 72 == 32 { 1.0 } else { 0.0 });
        }
        case.x.iter_mut().for_each(|x| *x = T::of(mean + x.wide() as f32 / 2.0));
        on_device(device, T::DTYPE, &case, Choices::default(), Epilogue::Moments, false);
    }
    let Some(device) = device() else { return };
    check::<f32>(&device, 2, (4, 21, 30), 200.0);
    // Tiles of 14 x 13 pixels, of which the last has 11 columns: the first row of two of its warps is outside.
    check::<f16>(&device, 1, (2, 14, 37), 2000.0);
}

/// ⟨conv x, y⟩ = ⟨x, dgrad y⟩ = ⟨w, wgrad⟩, to the rounding of those sums.
#[test]
fn directions_are_adjoint() {
    let Some(device) = device() else { return };
    for (stride, padding, images) in
        [(1, Padding::Same, (2, 7, 12)), (2, Padding::Same, (2, 8, 11)), (2, Padding::Symmetric, (2, 8, 10))]
    {
        let conv = dense(stride, padding, 24, 40);
        let mut case = Case::<f32>::random(conv, images, 11);
        case.before.fill(0.0);
        let actual = on_device(&device, Dtype::F32, &case, Choices::default(), Epilogue::Plain, false);
        let product = dot(&wide(&actual.y), case.dy().0.data());
        // Every term of the three sums is the same product of three.
        let size = dot(case.fprop().1.data(), case.dy().1.data());
        let bound = size * (roundings(case.y_shape.pixels() + 9 * conv.outputs) + 4.0 * EPSILON);
        for (name, other) in [
            ("dgrad", dot(&wide(&case.x), &wide(&actual.dx))),
            ("wgrad", dot(&wide(&case.weight), &wide(&actual.dweight))),
        ] {
            assert!(
                (product - other).abs() <= bound,
                "{name}: {other} instead of {product}, {bound:e} allowed"
            );
        }
    }
}

#[test]
fn results_repeat_bit_for_bit() {
    let Some(device) = device() else { return };
    let by_warpgroups = device.has_wgmma().then_some((1, wgmma(0)));
    for (stride, choices) in
        [(1, Choices::default()), (2, Choices::default())].into_iter().chain(by_warpgroups)
    {
        let run = |seed| {
            if let Some(control) = device.host_control() {
                control.shuffle(seed);
            }
            let case = Case::<bf16>::random(dense(stride, Padding::Same, 24, 136), (3, 19, 22), 4);
            on_device(&device, Dtype::Bf16, &case, choices, Epilogue::Moments, true)
        };
        let first = run(0);
        for seed in other_schedules() {
            assert!(first == run(seed), "schedule {seed}");
        }
    }
}

#[test]
fn impossible_plans_are_refused() {
    let good = dense(2, Padding::Same, 16, 24);
    let x = Shape::new(2, 5, 4, 16);
    assert_eq!(Conv3x3Shape::new(&good, x).unwrap().output(), Shape::new(2, 3, 2, 24));
    for (conv, x) in [
        (Conv { kernel: 5, ..good }, x),
        (Conv { kind: ConvKind::Depthwise, outputs: 16, ..good }, x),
        (Conv { stride: 3, ..good }, x),
        (Conv { inputs: 12, ..good }, Shape { c: 12, ..x }),
        (Conv { outputs: 20, ..good }, x),
        (Conv { outputs: 0, ..good }, x),
        (good, Shape { c: 8, ..x }),
        (good, Shape { n: 0, ..x }),
        (good, Shape { n: 1 << 20, h: 64, w: 64, ..x }),
        (dense(1, Padding::Same, 1 << 15, 1 << 15), Shape::new(1, 1, 1, 1 << 15)),
    ] {
        let refused = Conv3x3Shape::new(&conv, x);
        assert!(matches!(refused, Err(Error::Shape { .. })), "{conv:?} of {x}: {refused:?}");
    }
}

#[test]
fn unfit_buffers_are_refused_before_anything_runs() {
    let Some(device) = device() else { return };
    let stream = device.compute();
    // 1600 elements of x, 576 weights, 400 of y.
    let plan =
        Conv3x3::<f32>::plan(&device, &dense(2, Padding::Same, 8, 8), Shape::new(2, 10, 10, 8)).unwrap();
    let mut workspace = Workspace::new(&device, plan.workspace_floats()).unwrap();
    let mut small = Workspace::new(&device, 1).unwrap();
    let input = device.zeros::<f32>(4096).unwrap();
    let mut out = device.zeros::<f32>(2048).unwrap();
    let refused =
        |result: effnetv2::Result<()>| assert!(matches!(result, Err(Error::Shape { .. })), "{result:?}");
    for (x, weight, y) in [
        (0..1599, 576, 0..400),
        (1..1601, 576, 0..400),
        (0..1600, 575, 0..400),
        (0..1600, 576, 0..401),
        (0..1600, 576, 1..401),
    ] {
        let (x, weight) = (input.slice(x), input.slice(..weight));
        let (x, y) = (Input::Plain(&x), &mut out.slice_mut(y));
        refused(plan.fprop(stream, x, &weight, y, Output::Plain, &mut workspace));
    }
    let (x, weight, norm) = (input.slice(..1600), input.slice(..576), input.slice(..32));
    let plain = Input::Plain(&x);
    let gate = input.slice(..16);
    for x in [Input::Silu { y: &x, norm: &norm }, Input::Gated { y: &x, norm: &norm, gate: &gate }] {
        let y = &mut out.slice_mut(..400);
        refused(plan.fprop(stream, x, &weight, y, Output::Plain, &mut workspace));
    }
    for (bias, skip) in [(7, 400), (8, 399)] {
        let (bias, skip) = (input.slice(..bias), input.slice(..skip));
        let output = Output::Folded { bias: &bias, act: Activation::Silu, skip: Some(&skip) };
        refused(plan.fprop(stream, plain, &weight, &mut out.slice_mut(..400), output, &mut workspace));
    }
    for channels in [8, 16] {
        let mut norm = Norm::random(&device, channels, 1);
        let workspace = if channels == 8 { &mut small } else { &mut workspace };
        norm.with(|statistics| {
            let (y, output) = (&mut out.slice_mut(..400), Output::Moments(statistics));
            refused(plan.fprop(stream, plain, &weight, y, output, workspace));
        });
    }
    let (g, owed, short, factors) =
        (input.slice(..400), input.slice(..24), input.slice(..399), input.slice(..2));
    let gradient = GradientView { g: &g, y: &g, owed: &owed, arrival: Arrival::Alone };
    for wrong in [
        GradientView { g: &short, ..gradient },
        GradientView { y: &short, ..gradient },
        GradientView { owed: &norm, ..gradient },
        GradientView { arrival: Arrival::Factors(&factors), ..gradient },
    ] {
        let output = GradientOutput::Plain { skip: None };
        refused(plan.dgrad(stream, wrong, &weight, &mut out.slice_mut(..1600), output));
        refused(plan.wgrad(stream, plain, wrong, &mut out.slice_mut(..576), &mut workspace));
    }
    for (skip, dx) in [(1599, 1600), (1600, 1599)] {
        let skip = input.slice(..skip);
        let output = GradientOutput::Plain { skip: Some(&skip) };
        refused(plan.dgrad(stream, gradient, &weight, &mut out.slice_mut(..dx), output));
    }
    let mut sums = device.zeros::<f32>(5 * 2 * 8).unwrap();
    let output = GradientOutput::Gated { y: &x, norm: &norm, sums: &mut sums.as_view_mut() };
    refused(plan.dgrad(stream, gradient, &weight, &mut out.slice_mut(..1600), output));
    let silu = Input::Silu { y: &x, norm: &norm };
    refused(plan.wgrad(stream, silu, gradient, &mut out.slice_mut(..576), &mut workspace));
    refused(plan.wgrad(stream, plain, gradient, &mut out.slice_mut(..575), &mut workspace));
    let many =
        Conv3x3::<f32>::plan(&device, &dense(1, Padding::Same, 8, 8), Shape::new(1, 20, 20, 8)).unwrap();
    assert!(many.workspace_floats() > 1);
    let (x, g) = (input.slice(..3200), input.slice(..3200));
    let gradient = GradientView { g: &g, y: &g, ..gradient };
    refused(many.wgrad(stream, Input::Plain(&x), gradient, &mut out.slice_mut(..576), &mut small));
    assert_eq!(device.read(&out).unwrap(), vec![0.0; 2048]);

    // The moments of a single value are none.
    let plan = Conv3x3::<f32>::plan(&device, &dense(2, Padding::Same, 8, 8), Shape::new(1, 2, 2, 8)).unwrap();
    Norm::random(&device, 8, 1).with(|statistics| {
        let (x, y) = (input.slice(..32), &mut out.slice_mut(..8));
        let (x, output) = (Input::Plain(&x), Output::Moments(statistics));
        refused(plan.fprop(stream, x, &weight, y, output, &mut workspace));
    });
}

/// A layer of V2-S at 300 pixels: what it moves is what its tensors hold.
#[test]
fn costs_are_counted() {
    let shape = Conv3x3Shape::new(&dense(1, Padding::Same, 48, 192), Shape::new(256, 75, 75, 48)).unwrap();
    let pixels = 256 * 75 * 75;
    let (x, y, weights) = (48 * pixels, 192 * pixels, 9 * 48 * 192);
    let work = shape.fprop_work(Dtype::Bf16, OutputKind::Plain);
    assert_eq!(
        (work.kernel.as_str(), work.cost.bytes),
        ("conv3x3_fprop_tiles64_bf16", 2 * (x + y + weights))
    );
    assert_eq!(work.cost.tensor_operations, 2 * pixels * weights);
    let moments = shape.fprop_work(Dtype::Bf16, OutputKind::Moments);
    let runs = u64::from(moments.grid[0]) / 3;
    assert!((256..=512).contains(&runs), "{moments:?}");
    assert_eq!(moments.cost.bytes, work.cost.bytes + 4 * (2 * runs * 192 + 10 * 192));
    let folded = shape.fprop_work(Dtype::Bf16, OutputKind::Folded { skip: true });
    assert_eq!(folded.cost.bytes, work.cost.bytes + 2 * y + 4 * 192);
    let dgrad = shape.dgrad_work(Dtype::Bf16, true);
    assert_eq!(dgrad.cost.bytes, 2 * (2 * y + 2 * x + weights) + 4 * 3 * 192);
    let [wgrad, sum] = shape.wgrad_work(Dtype::Bf16).try_into().unwrap();
    let partial = u64::from(wgrad.grid[0]) * 96 * 9 * 48;
    assert_eq!((wgrad.kernel.as_str(), wgrad.grid), ("conv3x3_wgrad_24_s1_bf16", [132, 1, 1]));
    assert_eq!(wgrad.cost.bytes, 2 * (2 * y + x) + 4 * (partial + 3 * 192));
    assert_eq!(wgrad.cost.tensor_operations, 2 * pixels * weights);
    assert_eq!((sum.kernel.as_str(), sum.cost.bytes), ("conv3x3_wgrad_sum", 4 * (partial + 2 * weights)));
    let [wgrad] = shape.wgrad_work(Dtype::F32).try_into().unwrap();
    let partial = u64::from(wgrad.grid[0]) * 64 * 128;
    assert_eq!(wgrad.cost.bytes, 4 * (2 * y + x) + 4 * (partial + 2 * weights + 3 * 192));
}

#[test]
fn on_a_gpu() {
    again_on_a_gpu("on_a_gpu");
}
