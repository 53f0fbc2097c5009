//! The paper's table 3: one network with more and more of its stages fused.

use super::Bench;
use super::step::{self, Pass, StepResult};
use super::timing::Clock;
use crate::Result;
use crate::backend::Backend;
use crate::model::Architecture;
use crate::nn::BlockKind;
use serde::{Deserialize, Serialize};

/// The stages that the paper fuses, counted from the first.
pub const FUSED_STAGES: [usize; 4] = [0, 3, 5, 7];

/// What a published row of table 3 says (Tan & Le 2021): millions of parameters, billions of multiply-adds, images a second
/// and core of a TPUv3, images a second of a V100.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Published {
    /// Parameters.
    pub parameters: f64,
    /// Multiply-adds.
    pub macs: f64,
    /// On a TPUv3 core.
    pub tpu: f64,
    /// On a V100.
    pub v100: f64,
}

/// The rows, by number of fused stages, of EfficientNet-B4.
pub const PUBLISHED: [(usize, Published); 4] = [
    (0, Published { parameters: 19.3e6, macs: 4.5e9, tpu: 262.0, v100: 155.0 }),
    (3, Published { parameters: 20.0e6, macs: 7.5e9, tpu: 362.0, v100: 216.0 }),
    (5, Published { parameters: 43.4e6, macs: 21.3e9, tpu: 327.0, v100: 223.0 }),
    (7, Published { parameters: 132.0e6, macs: 34.4e9, tpu: 254.0, v100: 206.0 }),
];

/// The side of the dense kernels of fused stages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FusedKernel {
    /// 3×3 in the first three stages, elsewhere as it was. The paper does not say; with this its parameters are met
    /// to 2 % and its multiply-adds to 3 %, in every row, which neither 3×3 everywhere nor unchanged kernels do.
    Paper,
    /// 3×3.
    Three,
}

/// `architecture` with its first `fused` stages as Fused-MBConv, without squeeze-excitation, and the others as MBConv, with
/// one of a quarter of the input channels.
pub fn fuse(architecture: &Architecture, fused: usize, kernel: FusedKernel) -> Architecture {
    let mut changed = architecture.clone();
    for (index, stage) in changed.stages.iter_mut().enumerate() {
        if index >= fused {
            (stage.kind, stage.squeeze_ratio) = (BlockKind::MbConv, 0.25);
            continue;
        }
        (stage.kind, stage.squeeze_ratio) = (BlockKind::FusedMbConv, 0.0);
        if kernel == FusedKernel::Three || index < 3 {
            stage.kernel = 3;
        }
    }
    changed
}

/// How many stages to fuse in a network that has `stages`: the paper's numbers, and all.
pub fn rows(stages: usize) -> Vec<usize> {
    FUSED_STAGES.into_iter().filter(|&n| n < stages).chain([stages]).collect()
}

/// One row, measured.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct FusionResult {
    /// How many stages are fused, from the first on.
    pub fused_stages: usize,
    /// A training step of it; its `kind` is "fusion".
    #[serde(flatten)]
    pub step: StepResult,
}

/// Measures a training step with `fused` stages fused; `settings` say the rest.
///
/// # Errors
/// What backend and clock say, of memory above all.
pub fn run<B: Backend, C: Clock>(
    bench: &mut Bench<'_, B, C>,
    settings: &step::Settings,
    fused: usize,
) -> Result<FusionResult> {
    let mut step = step::run(bench, settings, Pass::Training)?;
    step.kind = "fusion".into();
    Ok(FusionResult { fused_stages: fused, step })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::summarise;

    #[test]
    fn the_rows_of_table_3_are_met() {
        let b4 = Architecture::find("v1-b4").unwrap();
        for (fused, published) in PUBLISHED {
            let network = fuse(&b4, fused, FusedKernel::Paper).network(1000);
            let total = summarise(&network, 380).total;
            let (parameters, macs) = (total.parameters as f64, total.macs as f64);
            assert!((parameters / published.parameters - 1.0).abs() < 0.021, "{fused}: {parameters}");
            assert!((macs / published.macs - 1.0).abs() < 0.03, "{fused}: {macs}");
        }
        assert_eq!(fuse(&b4, 0, FusedKernel::Paper), b4, "no stage fused is the network itself");
    }

    #[test]
    fn rows_fit_the_network() {
        assert_eq!(rows(7), [0, 3, 5, 7]);
        assert_eq!(rows(6), [0, 3, 5, 6]);
        assert_eq!(rows(4), [0, 3, 4]);
        assert_eq!(rows(2), [0, 2]);
    }

    #[test]
    fn three_is_three_everywhere_and_s_keeps_its_own_stages() {
        let b4 = fuse(&Architecture::find("v1-b4").unwrap(), 7, FusedKernel::Three);
        assert!(b4.stages.iter().all(|stage| stage.kernel == 3 && stage.squeeze_ratio == 0.0));
        let s = Architecture::find("s").unwrap();
        assert_eq!(fuse(&s, 3, FusedKernel::Paper), s);
    }
}
