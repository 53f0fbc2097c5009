//! The two public spellings of tensor names: timm's, which is ours, and torchvision's.

use crate::nn::{BlockKind, NetworkSpec};

/// A spelling of tensor names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Naming {
    /// `conv_stem.weight`, `blocks.1.0.conv_exp.weight`, `classifier.weight`.
    Timm,
    /// `features.0.0.weight`, `features.2.0.block.0.0.weight`, `classifier.1.weight`.
    Torchvision,
}

/// torchvision's name for the tensor that timm calls `name`; none when the network has no such tensor.
///
/// The parts of a block are numbered by what the block has, so the number depends on its kind and expansion.
pub fn torchvision_name(network: &NetworkSpec, name: &str) -> Option<String> {
    let (module, field) = name.rsplit_once('.')?;
    let last = network.stages.len() + 1;
    let place = match module {
        "conv_stem" => "features.0.0".into(),
        "bn1" => "features.0.1".into(),
        "conv_head" => format!("features.{last}.0"),
        "bn2" => format!("features.{last}.1"),
        "classifier" => "classifier.1".into(),
        _ => {
            let mut parts = module.strip_prefix("blocks.")?.splitn(3, '.');
            let stage: usize = parts.next()?.parse().ok()?;
            let index: usize = parts.next()?.parse().ok()?;
            let block = network.stages.get(stage)?.blocks.get(index)?;
            let expands = block.expansion != 1;
            let slots: &[(&str, &str)] = match (block.kind, expands) {
                (BlockKind::FusedMbConv, false) => &[("conv", "0.0"), ("bn1", "0.1")],
                (BlockKind::FusedMbConv, true) => {
                    &[("conv_exp", "0.0"), ("bn1", "0.1"), ("conv_pwl", "1.0"), ("bn2", "1.1")]
                }
                (BlockKind::MbConv, false) => &[
                    ("conv_dw", "0.0"),
                    ("bn1", "0.1"),
                    ("se.conv_reduce", "1.fc1"),
                    ("se.conv_expand", "1.fc2"),
                    ("conv_pw", "2.0"),
                    ("bn2", "2.1"),
                ],
                (BlockKind::MbConv, true) => &[
                    ("conv_pw", "0.0"),
                    ("bn1", "0.1"),
                    ("conv_dw", "1.0"),
                    ("bn2", "1.1"),
                    ("se.conv_reduce", "2.fc1"),
                    ("se.conv_expand", "2.fc2"),
                    ("conv_pwl", "3.0"),
                    ("bn3", "3.1"),
                ],
            };
            let part = parts.next()?;
            let slot = slots.iter().find(|slot| slot.0 == part)?.1;
            format!("features.{}.{index}.block.{slot}", stage + 1)
        }
    };
    Some(format!("{place}.{field}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Architecture;
    use crate::nn::Network;
    use std::collections::HashSet;

    #[test]
    fn known_names() {
        let s = Architecture::find("s").unwrap().network(1000);
        for (timm, torchvision) in [
            ("conv_stem.weight", "features.0.0.weight"),
            ("bn1.running_mean", "features.0.1.running_mean"),
            ("blocks.0.0.conv.weight", "features.1.0.block.0.0.weight"),
            ("blocks.1.0.conv_pwl.weight", "features.2.0.block.1.0.weight"),
            ("blocks.3.0.se.conv_reduce.weight", "features.4.0.block.2.fc1.weight"),
            ("blocks.3.5.bn3.bias", "features.4.5.block.3.1.bias"),
            ("conv_head.weight", "features.7.0.weight"),
            ("classifier.bias", "classifier.1.bias"),
        ] {
            assert_eq!(torchvision_name(&s, timm).as_deref(), Some(torchvision));
        }
        let v1 = Architecture::find("v1-b0").unwrap().network(1000);
        let ds = torchvision_name(&v1, "blocks.0.0.conv_pw.weight");
        assert_eq!(ds.as_deref(), Some("features.1.0.block.2.0.weight"));
        assert_eq!(torchvision_name(&s, "blocks.9.0.conv.weight"), None);
        assert_eq!(torchvision_name(&s, "nonsense"), None);
    }

    /// Every tensor has a name in both spellings, and no two share one: the map can be walked both ways.
    #[test]
    fn the_map_is_one_to_one() {
        for name in Architecture::names() {
            let network = Network::new(Architecture::find(name).unwrap().network(10));
            let entries = network.layout().params.iter().chain(&network.layout().stats);
            let theirs: Vec<_> =
                entries.map(|e| torchvision_name(network.spec(), &e.name).expect("a name")).collect();
            let distinct: HashSet<_> = theirs.iter().collect();
            assert_eq!(distinct.len(), theirs.len(), "{name}");
        }
    }
}
