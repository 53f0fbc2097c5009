//! The number of threads changes no bit of a training run.

use effnetv2::backend::{Backend, Mode, StepKey, Variables};
use effnetv2::model::{Architecture, initial_values};
use effnetv2::nn::Network;
use effnetv2::optimizer::{Rule, Step};
use effnetv2::reference::Reference;
use effnetv2::tensor::Shape;

/// Parameters and running statistics after two steps.
fn train(threads: usize) -> [Vec<f32>; 2] {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("threads");
    pool.install(|| {
        let network = Network::new(Architecture::find("nano").expect("a known model").network(10));
        let (params, stats) = initial_values::<f32>(network.layout(), 0);
        let mut slots = [vec![0.0; params.len()]];
        let mut vars = Variables { grads: vec![0.0; params.len()], params, stats };
        let mut backend = Reference::new();
        let shape = Shape::new(5, 75, 75, 3);
        let pixels: Vec<f32> = (0..shape.elements()).map(|i| (i as f32 * 0.618).fract() - 0.5).collect();
        let targets: Vec<f32> = (0..50).map(|i| if i % 11 == 0 { 1.0 } else { 0.0 }).collect();
        for number in 0..2 {
            backend.begin_step(&StepKey { seed: 1, epoch: 0, images: (0..5).collect() });
            let x = backend.tensor(shape, pixels.clone()).expect("images");
            let mut pass = network.forward(&mut backend, x, &mut vars, Mode::Train, 0.2).expect("forward");
            backend.cross_entropy(&mut pass.head, &targets).expect("loss");
            network.backward(&mut backend, pass, &mut vars).expect("backward");
            let step = Step { number, learning_rate: 0.05, weight_decay: 1e-4, gradient_scale: 1.0 };
            let rule = Rule::Sgd { momentum: 0.9, nesterov: true };
            let kernels = network.layout().decayed();
            backend.update(rule, &step, &kernels, &mut vars, &mut slots).expect("update");
            backend.clear(&mut vars.grads).expect("clear");
        }
        [vars.params, vars.stats]
    })
}

#[test]
fn one_two_and_seven_threads_agree_bit_for_bit() {
    let one = train(1);
    assert!(one.iter().flatten().all(|v| v.is_finite()));
    assert!(one == train(2), "two threads");
    assert!(one == train(7), "seven threads");
}
