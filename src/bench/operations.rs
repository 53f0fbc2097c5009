//! Every operation of a training step, on every shape that the step has.

use super::Bench;
use super::step::{Pass, Settings, Stepper};
use super::timed::{Call, Timed};
use super::timing::{Clock, Milliseconds};
use crate::Result;
use crate::backend::Backend;
use crate::tensor::{Dtype, Shape};
use serde::{Deserialize, Serialize};

/// One operation on one shape, measured.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct OperationResult {
    /// "op".
    pub kind: String,
    /// The network whose step it is part of.
    pub model: String,
    /// Side of the network's images in pixels.
    pub size: usize,
    /// The operation of [`Backend`].
    pub operation: String,
    /// The layer in words.
    pub layer: String,
    /// What it reads: images, rows, columns, channels.
    pub input: [usize; 4],
    /// How often a step does it.
    pub calls: usize,
    /// The element type of tensors.
    pub dtype: Dtype,
    /// The time of a call.
    pub time: Milliseconds,
    /// The time of all its calls, over that of all operations.
    pub share: f64,
    /// Operations a second, where they are convolutions': two for each multiply-add.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub operations_per_second: Option<f64>,
}

/// Times the operations of training steps: one step to warm up, then one a round. The costliest come first.
///
/// # Errors
/// What backend and clock say.
pub fn run<B: Backend, C: Clock>(
    bench: &mut Bench<'_, B, C>,
    settings: &Settings,
) -> Result<Vec<OperationResult>> {
    let Stepper { network, state, .. } = bench.stepper(settings, Pass::Training)?;
    let (mut timed, names) = Timed::new(bench.backend, bench.clock, state);
    let mut stepper = Stepper::new(settings, network, names);
    let mut rounds = Vec::new();
    for round in 0..=bench.effort.rounds.max(1) {
        stepper.train(&mut timed)?;
        let calls = timed.take()?;
        if round > 0 {
            rounds.push(calls);
        }
    }
    timed.discard_sent();
    Ok(summarise(settings, &rounds))
}

/// Equal calls as one, by the share of time that they take.
fn summarise(settings: &Settings, rounds: &[Vec<(Call, f64)>]) -> Vec<OperationResult> {
    let mut kinds: Vec<&Call> = Vec::new();
    for (call, _) in rounds.iter().flatten() {
        if !kinds.contains(&call) {
            kinds.push(call);
        }
    }
    let mut results: Vec<OperationResult> = Vec::new();
    for kind in kinds {
        let one = |round: &Vec<(Call, f64)>| {
            let of_kind: Vec<f64> = round.iter().filter(|(c, _)| c == kind).map(|(_, s)| *s).collect();
            (of_kind.len(), of_kind.iter().sum::<f64>() / of_kind.len().max(1) as f64)
        };
        let means: Vec<f64> = rounds.iter().map(|round| one(round).1).collect();
        let calls = rounds.first().map_or(0, |round| one(round).0);
        let time = Milliseconds::of(&means);
        let Shape { n, h, w, c } = kind.input;
        let rate = kind.operations as f64 / (time.median / 1e3);
        results.push(OperationResult {
            kind: "op".into(),
            model: settings.network.name.clone(),
            size: settings.size,
            operation: kind.operation.into(),
            layer: kind.layer.clone(),
            input: [n, h, w, c],
            calls,
            dtype: settings.dtype,
            time,
            share: calls as f64 * time.median,
            operations_per_second: (kind.operations > 0).then_some(rate),
        });
    }
    let total: f64 = results.iter().map(|result| result.share).sum();
    results.iter_mut().for_each(|result| result.share /= total);
    results.sort_by(|a, b| b.share.total_cmp(&a.share));
    results
}

#[cfg(test)]
mod tests {
    use super::super::timing::{Effort, HostClock};
    use super::*;
    use crate::model::{self, Architecture};
    use crate::nn::Network;
    use crate::reference::Reference;

    fn settings() -> Settings {
        let network = Architecture::find("nano").unwrap().network(10);
        Settings { network, size: 32, batch: 2, dtype: Dtype::F32, ceiling: None }
    }

    #[test]
    fn a_step_is_all_of_its_operations() {
        let mut backend = Reference::<f32>::new();
        let effort = Effort { rounds: 2, round_seconds: 0.0, warm_up_seconds: 0.0 };
        let mut bench = Bench { backend: &mut backend, clock: &HostClock, effort, cache: 0 };
        let results = run(&mut bench, &settings()).unwrap();
        assert!((results.iter().map(|r| r.share).sum::<f64>() - 1.0).abs() < 1e-9);
        assert!(results.windows(2).all(|pair| pair[0].share >= pair[1].share));
        let calls = |operation: &str| -> usize {
            results.iter().filter(|r| r.operation == operation).map(|r| r.calls).sum()
        };
        let convolutions = Network::new(settings().network).convolutions().count();
        assert_eq!(calls("conv"), convolutions);
        assert_eq!(calls("conv_backward") + 1, convolutions);
        let once =
            ["input", "head", "loss_gradient", "head_backward", "conv_backward_weights", "update", "clear"];
        for operation in once {
            assert_eq!(calls(operation), 1, "{operation}");
        }
        // A forward's multiply-adds are those of the summary, but for squeeze-excitations and the classifier.
        let forward: f64 = results
            .iter()
            .filter(|r| r.operation == "conv")
            .map(|r| r.operations_per_second.unwrap() * r.time.median / 1e3 * r.calls as f64)
            .sum();
        let macs = 2.0 * 2.0 * model::summarise(&settings().network, 32).total.macs as f64;
        assert!(forward < macs && forward > 0.98 * macs, "{forward} {macs}");
    }

    #[test]
    fn timing_changes_no_result() {
        let settings = settings();
        let values = |timed: bool| {
            let mut backend = Reference::<f32>::new();
            let effort = Effort { rounds: 1, round_seconds: 0.0, warm_up_seconds: 0.0 };
            let mut bench = Bench { backend: &mut backend, clock: &HostClock, effort, cache: 0 };
            let mut stepper = bench.stepper(&settings, Pass::Training).unwrap();
            if !timed {
                stepper.train(bench.backend).unwrap();
                return stepper.state.vars.params;
            }
            let Stepper { network, state, .. } = stepper;
            let (mut timed, names) = Timed::new(bench.backend, &HostClock, state);
            let mut stepper = Stepper::new(&settings, network, names);
            stepper.train(&mut timed).unwrap();
            timed.read(&stepper.state.vars.params).unwrap()
        };
        assert_eq!(values(true), values(false));
    }

    #[test]
    fn equal_calls_are_one_row() {
        let call = |operation, side| Call {
            operation,
            layer: "l".into(),
            input: Shape::new(1, side, side, 8),
            operations: 1000,
        };
        let round = |a, b, c| vec![(call("conv", 4), a), (call("conv", 2), b), (call("conv", 4), c)];
        let rounds = [round(0.001, 0.010, 0.003), round(0.002, 0.012, 0.004), round(0.003, 0.014, 0.005)];
        let results = summarise(&settings(), &rounds);
        assert_eq!(results.iter().map(|r| (r.input[1], r.calls)).collect::<Vec<_>>(), [(2, 1), (4, 2)]);
        assert_eq!((results[0].time.median, results[1].time.median), (12.0, 3.0));
        assert!((results[0].share - 12.0 / 18.0).abs() < 1e-12);
        assert!((results[1].operations_per_second.unwrap() - 1000.0 / 0.003).abs() < 1e-6);
    }
}
