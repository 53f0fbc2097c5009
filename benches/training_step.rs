//! A whole training step of the CPU reference in f32: forward, loss, backward, SGD with momentum.
//!
//! Prints the peak of resident memory (on Linux) behind each case. `benches/peers/training_step.py` measures the same step
//! in PyTorch.

use criterion::{Criterion, criterion_group, criterion_main};
use effnetv2::backend::{Backend, Mode, State, StepKey};
use effnetv2::model::{Architecture, initial_values};
use effnetv2::nn::Network;
use effnetv2::optimizer::{Rule, Scalars, Step};
use effnetv2::reference::Reference;
use effnetv2::tensor::Shape;
use std::hint::black_box;
use std::time::Duration;

/// model, image side, batch
const CASES: &[(&str, usize, usize)] = &[("b0", 96, 16), ("s", 128, 8)];

/// The peak of resident memory in MiB since the last call.
fn peak_memory() -> Option<f64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")?.strip_suffix("kB"))?;
    std::fs::write("/proc/self/clear_refs", "5").ok()?;
    Some(peak.trim().parse::<f64>().ok()? / 1024.0)
}

fn training_step(c: &mut Criterion) {
    let mut group = c.benchmark_group("training_step");
    group.sample_size(10).warm_up_time(Duration::from_secs(2)).measurement_time(Duration::from_secs(15));
    for &(model, side, batch) in CASES {
        let network = Network::new(Architecture::find(model).expect("a known model").network(1000));
        let (params, stats) = initial_values::<f32>(network.layout(), 0);
        let rule = Rule::Sgd { momentum: 0.9, nesterov: false };
        let kernels = network.layout().decayed();
        let mut backend = Reference::<f32>::new();
        let mut state = State::new(&backend, rule, params, stats).expect("a state");
        let shape = Shape::new(batch, side, side, 3);
        let pixels: Vec<f32> =
            (0..shape.elements()).map(|i| (i as f32 * 0.618).fract() * 2.0 - 1.0).collect();
        let mut targets = vec![0.0; batch * 1000];
        (0..batch).for_each(|i| targets[i * 1000 + i * 7] = 1.0);
        let images: Vec<u32> = (0..batch as u32).collect();
        let mut number = 0;
        group.bench_function(format!("{model}_{side}px_batch{batch}"), |b| {
            b.iter(|| {
                backend.begin_step(&StepKey { seed: 1, epoch: 0, images: images.clone() }).unwrap();
                let x = backend.tensor(shape, pixels.clone()).expect("a tensor");
                let vars = &mut state.vars;
                let mut pass = network.forward(&mut backend, x, vars, Mode::Train, 0.2).expect("forward");
                black_box(backend.cross_entropy(&mut pass.head, &targets).expect("loss"));
                backend.clear(&mut vars.grads).expect("clear");
                network.backward(&mut backend, pass, vars).expect("backward");
                let step = Step { number, learning_rate: 1e-4, weight_decay: 0.0, gradient_scale: 1.0 };
                backend
                    .begin_update(rule, &Scalars::plain(step), state.vars.params.len(), &kernels)
                    .expect("an update");
                backend.update(&mut state).expect("update");
                number += 1;
            });
        });
        let peak = peak_memory();
        if let (Some(peak), true) = (peak, number > 0) {
            println!("{model}_{side}px_batch{batch}: peak memory {peak:.0} MiB");
        }
    }
    group.finish();
}

criterion_group!(benches, training_step);
criterion_main!(benches);
