//! The number of threads changes no bit of a training run.

use effnetv2::backend::{Backend, Mode, State, StepKey};
use effnetv2::model::{Architecture, initial_values};
use effnetv2::nn::Network;
use effnetv2::optimizer::{Rule, Scalars, Step};
use effnetv2::reference::Reference;
use effnetv2::tensor::Shape;

/// Parameters and running statistics after two steps.
fn train(threads: usize) -> [Vec<f32>; 2] {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("threads");
    pool.install(|| {
        let network = Network::new(Architecture::find("nano").expect("a known model").network(10));
        let (params, stats) = initial_values::<f32>(network.layout(), 0);
        let rule = Rule::Sgd { momentum: 0.9, nesterov: true };
        let mut backend = Reference::new();
        let mut state = State::new(&backend, rule, params, stats).expect("a state");
        let shape = Shape::new(5, 75, 75, 3);
        let pixels: Vec<f32> = (0..shape.elements()).map(|i| (i as f32 * 0.618).fract() - 0.5).collect();
        let targets: Vec<f32> = (0..50).map(|i| if i % 11 == 0 { 1.0 } else { 0.0 }).collect();
        for number in 0..2 {
            backend.begin_step(&StepKey { seed: 1, epoch: 0, images: (0..5).collect() }).unwrap();
            let x = backend.tensor(shape, pixels.clone()).expect("images");
            let vars = &mut state.vars;
            let mut pass = network.forward(&mut backend, x, vars, Mode::Train, 0.2).expect("forward");
            backend.cross_entropy(&mut pass.head, &targets).expect("loss");
            backend.clear(&mut vars.grads).expect("clear");
            network.backward(&mut backend, pass, vars).expect("backward");
            let step = Step { number, learning_rate: 0.05, weight_decay: 1e-4, gradient_scale: 1.0 };
            let kernels = network.layout().decayed();
            backend
                .begin_update(rule, &Scalars::plain(step), state.vars.params.len(), &kernels)
                .expect("an update");
            backend.update(&mut state).expect("update");
        }
        [state.vars.params, state.vars.stats]
    })
}

#[test]
fn one_two_and_seven_threads_agree_bit_for_bit() {
    let one = train(1);
    assert!(one.iter().flatten().all(|v| v.is_finite()));
    assert!(one == train(2), "two threads");
    assert!(one == train(7), "seven threads");
}
