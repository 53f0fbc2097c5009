//! The device layer: arena, staging, graphs, launches and their errors, and the command that shows it all.

#![cfg(feature = "cuda")]

mod devices;

use devices::{again_on_a_gpu, device_alone, host_library};
use effnetv2::Error;
use effnetv2::device::cudarc::driver::{CudaSlice, DevicePtr};
use effnetv2::device::{Arena, Block, Device, Graph, Kernel, Launched, Layout, Staging, survey};
use effnetv2::kernels::optimizer::{Buffers, FAMILY, Optimizer, Scalars, UpdateShape, WorkingCopy};
use effnetv2::optimizer::{Rule, Step};
use effnetv2::tensor::Dtype;
use std::path::Path;
use std::process::Command;
use std::slice;

fn address(device: &Device, block: &Block<f32>) -> u64 {
    block.view().device_ptr(device.compute()).0
}

#[test]
fn an_arena_of_the_planned_size_is_just_enough() {
    let Some((device, _alone)) = device_alone() else { return };
    let lengths = [100, 1, 3000];
    let mut layout = Layout::new();
    for length in lengths {
        layout.push(4 * length);
    }
    let arena = Arena::new(&device, layout.high_water()).unwrap();
    let step = || {
        let blocks: Vec<Block<f32>> = lengths.map(|length| arena.push(length).unwrap()).into();
        assert_eq!(arena.used(), arena.capacity());
        assert!(
            matches!(arena.push::<f32>(1), Err(Error::ArenaFull { used, .. }) if used == arena.capacity())
        );
        blocks.iter().map(|block| address(&device, block)).collect::<Vec<_>>()
    };
    let first = step();
    assert_eq!(arena.used(), 0);
    // The same calls, the same addresses: what a graph needs.
    assert_eq!(first, step());
    assert!(first.iter().all(|address| address % 256 == 0));
    assert_eq!(arena.high_water(), layout.high_water());
}

#[test]
fn blocks_of_an_arena_are_apart() {
    let Some((device, _alone)) = device_alone() else { return };
    let arena = Arena::new(&device, 1 << 14).unwrap();
    let mut blocks: Vec<Block<f32>> = (0..5).map(|i| arena.push(100 + i).unwrap()).collect();
    let values = |i: usize, length: usize| vec![i as f32; length];
    for (i, block) in blocks.iter_mut().enumerate() {
        let values = values(i, block.len());
        effnetv2::device::write(device.compute(), &values, &mut block.view_mut()).unwrap();
    }
    // Given back from the middle, the room is handed out to what it holds, and to nothing larger.
    let middle = address(&device, &blocks[2]);
    drop(blocks.remove(2));
    let large: Block<f32> = arena.push(200).unwrap();
    assert!(blocks.iter().all(|block| address(&device, block) < address(&device, &large)));
    let mut small: Block<f32> = arena.push(50).unwrap();
    assert_eq!(address(&device, &small), middle);
    effnetv2::device::write(device.compute(), &[9.0; 50], &mut small.view_mut()).unwrap();
    for (i, block) in [0, 1, 3, 4].into_iter().zip(&blocks) {
        assert_eq!(device.read(&block.view()).unwrap(), values(i, block.len()));
    }
}

/// Batches arrive in order, each whole, while the next is under way.
#[test]
fn staging_brings_batches_in_order() {
    let Some((device, _alone)) = device_alone() else { return };
    let length = 1000;
    let mut staging = Staging::<u32>::new(&device, length).unwrap();
    let mut input = device.zeros::<u32>(length).unwrap();
    let batch = |number: u32| (0..length as u32).map(|i| number * 10_000 + i).collect::<Vec<_>>();
    let send = |staging: &mut Staging<u32>, number| {
        staging
            .send(|pinned| {
                pinned.copy_from_slice(&batch(number));
                Ok(())
            })
            .unwrap();
    };
    assert!(
        staging.receive(&mut input.as_view_mut()).unwrap_err().to_string().contains("no batch is on its way")
    );
    send(&mut staging, 0);
    for number in 0..6 {
        send(&mut staging, number + 1);
        let third = staging.send(|_| panic!("there is no room to fill")).unwrap_err();
        assert!(third.to_string().contains("two batches are on their way"));
        let short = staging.receive(&mut input.slice_mut(1..)).unwrap_err();
        assert!(short.to_string().contains("1000 elements, its destination 999"));
        staging.receive(&mut input.as_view_mut()).unwrap();
        assert_eq!(device.read(&input).unwrap(), batch(number));
    }
}

/// Two parameters' worth of an optimizer: all that a recorded step uses.
struct State {
    device: Device,
    plan: Optimizer,
    parameters: CudaSlice<f32>,
    gradients: CudaSlice<f32>,
    slots: Vec<CudaSlice<f32>>,
}

const PARAMETERS: usize = 5000;

fn state(device: &Device) -> State {
    let plan = Optimizer::plan(device, Rule::PAPER, PARAMETERS, slice::from_ref(&(10..4000))).unwrap();
    State {
        device: device.clone(),
        parameters: device.upload(&vec![1.0; PARAMETERS]).unwrap(),
        gradients: device.upload(&(0..PARAMETERS).map(|i| i as f32 / 100.0).collect::<Vec<_>>()).unwrap(),
        slots: plan.initial_slots().unwrap(),
        plan,
    }
}

fn begin(state: &mut State, number: u64) {
    let learning_rate = 0.1 / (number + 1) as f64;
    let step = Step { number, learning_rate, weight_decay: 0.01, gradient_scale: 1.0 };
    let scalars = Scalars { max_norm: Some(1.0), ..Scalars::plain(step) };
    state.plan.begin_step(state.device.compute(), &scalars).unwrap();
}

fn work(state: &mut State) -> effnetv2::Result<()> {
    let stream = state.device.compute();
    let gradients = state.gradients.as_view();
    state.plan.norm_and_clip(stream, &gradients)?;
    let buffers = Buffers {
        parameters: &mut state.parameters.as_view_mut(),
        gradients: &gradients,
        slots: &mut state.slots.iter_mut().map(CudaSlice::as_view_mut).collect::<Vec<_>>(),
        average: None,
        copy: WorkingCopy::None,
    };
    state.plan.update(stream, buffers)
}

#[test]
fn a_graph_does_the_same_steps_bit_for_bit() {
    let Some((device, _alone)) = device_alone() else { return };
    let mut plain = state(&device);
    for number in 0..4 {
        begin(&mut plain, number);
        work(&mut plain).unwrap();
    }
    let mut graph = Graph::record(&device, state(&device), work).unwrap();
    // Recording did nothing.
    assert_eq!(device.read(&graph.state().parameters).unwrap(), vec![1.0; PARAMETERS]);
    for number in 0..4 {
        // SAFETY: writes the scalars where they lie.
        begin(unsafe { graph.state_mut() }, number);
        graph.launch().unwrap();
    }
    let state = graph.into_state().unwrap();
    assert_eq!(device.read(&state.parameters).unwrap(), device.read(&plain.parameters).unwrap());
    assert_ne!(device.read(&state.parameters).unwrap(), vec![1.0; PARAMETERS]);
    for (slot, expected) in state.slots.iter().zip(&plain.slots) {
        assert_eq!(device.read(slot).unwrap(), device.read(expected).unwrap());
    }
}

/// Launch by launch and recorded.
#[test]
fn launches_overlap_where_that_is_asked_for() {
    let Some((device, _alone)) = device_alone() else { return };
    let Some(control) = device.host_control() else { return };
    let count = |overlapping: bool, graph: bool| {
        device.set_overlapping(overlapping).unwrap();
        assert_eq!(device.is_overlapping(), overlapping);
        let mut state = state(&device);
        begin(&mut state, 0);
        device.synchronize().unwrap();
        let before = control.dependents();
        if graph {
            let mut graph = Graph::record(&device, state, work).unwrap();
            // It stays as it was recorded.
            device.set_overlapping(!overlapping).unwrap();
            graph.launch().unwrap();
            state = graph.into_state().unwrap();
        } else {
            work(&mut state).unwrap();
        }
        device.synchronize().unwrap();
        (control.dependents() - before, device.read(&state.parameters).unwrap())
    };
    let (none, plain) = count(false, false);
    let (all, overlapping) = count(true, false);
    // The sum of the squares, its root, the update.
    assert_eq!((none, all), (0, 3));
    assert_eq!(plain, overlapping);
    assert_eq!(count(true, true), (3, plain.clone()));
    assert_eq!(count(false, true), (0, plain));
}

/// Launch by launch or recorded, the list says what was asked for, and the plan what would be.
#[test]
fn launches_are_written_down() {
    let Some((device, _alone)) = device_alone() else { return };
    let shape = UpdateShape { rule: Rule::PAPER, parameters: PARAMETERS };
    let [partial, finish] = shape.norm_work();
    let planned = [partial, finish, shape.update_work(false, Dtype::F32)];
    let check = |launched: Vec<Launched>| {
        assert_eq!(launched.len(), planned.len(), "{launched:?}");
        for (work, launched) in planned.iter().zip(&launched) {
            assert!(work.is(launched), "{work:?} was planned, {launched} launched");
        }
    };
    let mut plain = state(&device);
    begin(&mut plain, 0);
    device.log_launches();
    work(&mut plain).unwrap();
    check(device.take_launches());
    // Nothing is written down unasked.
    work(&mut plain).unwrap();
    assert_eq!(device.take_launches(), []);
    let recorded = state(&device);
    device.log_launches();
    let mut graph = Graph::record(&device, recorded, work).unwrap();
    graph.launch().unwrap();
    check(device.take_launches());
}

#[test]
fn values_are_repeated_on_the_device() {
    let Some((device, _alone)) = device_alone() else { return };
    let values: Vec<u32> = (1..=7).collect();
    for length in [1, 6, 7, 8, 14, 15, 100, 1000] {
        let expected: Vec<u32> = values.iter().copied().cycle().take(length).collect();
        assert_eq!(device.read(&device.repeat(&values, length).unwrap()).unwrap(), expected);
    }
    assert!(matches!(device.repeat::<u32>(&[], 3), Err(Error::Shape { .. })));
}

#[test]
fn buffers_are_copied_within_the_device() {
    let Some((device, _alone)) = device_alone() else { return };
    let from = device.upload(&[1.0_f32, 2.0, 3.0]).unwrap();
    let mut to = device.zeros::<f32>(3).unwrap();
    effnetv2::device::copy(device.compute(), &from, &mut to).unwrap();
    assert_eq!(device.read(&to).unwrap(), [1.0, 2.0, 3.0]);
    let mut short = device.zeros::<f32>(2).unwrap();
    let message = effnetv2::device::copy(device.compute(), &from, &mut short).unwrap_err().to_string();
    assert!(message.contains("3 elements cannot be copied to 2"), "{message}");
}

/// Reading waits for the device, which cannot be recorded; the stream must be left as it was.
#[test]
fn a_failed_recording_leaves_the_stream_usable() {
    let Some((device, _alone)) = device_alone() else { return };
    let reads = |state: &mut State| {
        work(state)?;
        state.device.read(&state.parameters).map(|_| ())
    };
    assert!(matches!(Graph::record(&device, state(&device), reads), Err(Error::Driver { .. })));
    let empty = Graph::record(&device, (), |()| Ok(()));
    // An empty graph is a graph to some drivers.
    assert!(empty.is_ok() || matches!(empty, Err(Error::Shape { .. })));
    let mut after = state(&device);
    begin(&mut after, 0);
    work(&mut after).unwrap();
    assert_ne!(device.read(&after.parameters).unwrap(), vec![1.0; PARAMETERS]);
}

fn cast_kernel(device: &Device) -> Kernel {
    device.module(&FAMILY).unwrap().kernel("optimizer_cast_bf16").unwrap()
}

#[test]
fn wrong_arguments_are_refused_before_the_launch() {
    let Some((device, _alone)) = device_alone() else { return };
    let (kernel, stream) = (cast_kernel(&device), device.compute());
    let values = device.zeros::<f32>(8).unwrap();
    let mut copy = device.zeros::<half::bf16>(8).unwrap();
    let (values, mut copy) = (values.as_view(), copy.as_view_mut());
    let mut launch = kernel.on(stream);
    launch.input(&values).output(&mut copy).value(&8_i32);
    // SAFETY: it is not launched.
    let message = unsafe { launch.run([1, 1, 1], 0, "8 values") }.unwrap_err().to_string();
    assert!(message.contains("optimizer_cast_bf16") && message.contains("\"ppI\", not \"ppi\""), "{message}");
    assert!(
        device
            .module(&FAMILY)
            .unwrap()
            .kernel("no_such")
            .unwrap_err()
            .to_string()
            .contains("no kernel `no_such`")
    );
}

#[test]
fn launch_errors_name_kernel_grid_block_and_shapes() {
    let Some((device, _alone)) = device_alone() else { return };
    let (kernel, stream) = (cast_kernel(&device), device.compute());
    let values = device.zeros::<f32>(8).unwrap();
    let mut copy = device.zeros::<half::bf16>(8).unwrap();
    let mut launch = |shared| {
        let (values, mut copy) = (values.as_view(), copy.as_view_mut());
        let mut launch = kernel.on(stream);
        launch.input(&values).output(&mut copy).value(&8_u32);
        // SAFETY: both buffers have 8 elements; the shared memory is not used.
        unsafe { launch.run([1, 1, 1], shared, "8 values") }.map_err(|error| error.to_string())
    };
    let message = launch(60_000).unwrap_err();
    for part in ["optimizer_cast_bf16", "grid 1×1×1", "block 256", "60000 bytes", "8 values", "CUDA_ERROR"]
    {
        assert!(message.contains(part), "{part}: {message}");
    }
    kernel.allow_shared(60_000).unwrap();
    launch(60_000).unwrap();
    assert!(kernel.allow_shared(10_000_000).unwrap_err().to_string().contains("10000000 bytes"));
}

/// Where work is deferred a failure shows at some later call, unless every launch is waited for. Only the host device
/// survives the failure.
#[test]
fn debugging_names_the_kernel_at_fault() {
    let Some((device, _alone)) = device_alone() else { return };
    let Some(control) = device.host_control() else { return };
    let (kernel, stream) = (cast_kernel(&device), device.compute());
    let values = device.zeros::<f32>(8).unwrap();
    let mut copy = device.zeros::<half::bf16>(8).unwrap();
    let mut launch = || {
        let (values, mut copy) = (values.as_view(), copy.as_view_mut());
        let too_many = 1_u32 << 20;
        let mut launch = kernel.on(stream);
        launch.input(&values).output(&mut copy).value(&too_many);
        // SAFETY: it is not: the host device must find the access beyond the buffers and refuse it.
        unsafe { launch.run([512, 1, 1], 0, "too many values") }
    };
    control.defer(true);
    let unnoticed = launch();
    let later = device.synchronize().unwrap_err().to_string();
    device.set_debugging(true);
    let noticed = launch();
    control.defer(false);
    unnoticed.unwrap();
    assert!(!later.contains("too many values"), "{later}");
    let message = noticed.unwrap_err().to_string();
    assert!(message.contains("too many values") && message.contains("optimizer_cast_bf16"), "{message}");
    device.synchronize().unwrap();
}

#[test]
fn work_is_timed() {
    let Some((device, _alone)) = device_alone() else { return };
    let mut state = state(&device);
    begin(&mut state, 0);
    let time = device.time(|| work(&mut state)).unwrap();
    assert!(time.as_nanos() > 0 && time.as_secs() < 60, "{time:?}");
}

#[test]
fn memory_that_cannot_be_is_an_error() {
    let Some((device, _alone)) = device_alone() else { return };
    assert!(matches!(device.zeros::<f32>(0), Err(Error::Shape { .. })));
    assert!(matches!(device.zeros::<f32>(usize::MAX), Err(Error::Shape { .. })));
    let message = device.zeros::<f32>(1 << 50).unwrap_err().to_string();
    assert!(
        message.contains("allocate 4503599627370496 bytes") && message.contains("smaller batch"),
        "{message}"
    );
}

#[test]
fn a_process_has_one_driver() {
    let Some((device, _alone)) = device_alone() else { return };
    if !device.is_host() {
        return;
    }
    let message = Device::cuda(0).unwrap_err().to_string();
    assert!(message.contains("already uses the host device"), "{message}");
    assert!(matches!(Device::host(Path::new("no/such/library")), Err(Error::Io { .. })));
    let found = survey(host_library()).unwrap();
    assert_eq!(found.gpus, [device.gpu().clone()]);
}

#[test]
fn a_file_that_is_no_host_device_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("Cargo.toml");
    std::fs::write(&file, "[package]").unwrap();
    let (code, text) = run(&["devices", "--host", file.to_str().unwrap()]);
    assert_eq!(code, 1);
    assert!(text.contains("Cargo.toml: is no host device"), "{text}");
}

/// Whatever this machine has; without a driver the answer says so.
#[test]
fn the_devices_command_answers_without_a_driver() {
    let (code, text) = run(&["devices"]);
    assert_eq!(code, 0, "{text}");
    assert!(text.contains("kernels: "), "{text}");
    assert!(text.contains("driver: CUDA ") || text.contains("driver: no NVIDIA driver: "), "{text}");
}

#[test]
fn the_devices_command_lists_every_kernel() {
    let Some(library) = host_library() else { return };
    let (code, text) = run(&["devices", "--host", library.to_str().unwrap()]);
    assert_eq!(code, 0, "{text}");
    assert!(text.contains("effnetv2 host device, compute capability 8.0"), "{text}");
    for entry in FAMILY.kernels {
        assert!(text.lines().any(|line| line.starts_with(entry.name)), "{}: {text}", entry.name);
    }
}

/// The program's exit code, and all it prints.
fn run(arguments: &[&str]) -> (i32, String) {
    // Elsewhere than where they were built, the tests are told where the program is.
    let program = std::env::var("EFFNETV2_TEST_PROGRAM");
    let program = program.unwrap_or_else(|_| env!("CARGO_BIN_EXE_effnetv2").into());
    let output = Command::new(program).args(arguments).output().unwrap();
    let text = [output.stdout, output.stderr].concat();
    (output.status.code().unwrap(), String::from_utf8(text).unwrap())
}

#[test]
fn the_same_on_a_gpu() {
    again_on_a_gpu("the_same_on_a_gpu");
}
