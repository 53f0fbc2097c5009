//! Which of several launches computes a convolution, where a measurement has said so.
//!
//! A wrapper derives its launches from the shape by rules that are the same on every GPU. A [`Tuning`] replaces the rule for
//! single launches by a [`Choice`], as `effnetv2 bench tune` found it the fastest on one GPU. What is computed stays
//! within the roundings of the type, but sums are taken in another order: runs with and without, or with another, differ in
//! their last bits. Without one the rules hold.

use crate::device::Device;
use crate::tensor::{Conv, ConvKind, Dtype, Padding, Shape};
use crate::{Error, Result};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fmt::{self, Display, Formatter};
use std::fs;
use std::path::Path;
use std::str::FromStr;
use std::sync::Arc;

/// The version of the format.
const SCHEMA: u32 = 1;

/// A launch that there may be several of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Launch {
    /// The output.
    Fprop,
    /// The gradient of the input.
    Dgrad,
    /// The gradient of the weights.
    Wgrad,
    /// Both gradients.
    Backward,
}

impl Launch {
    /// Its name in a file.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Fprop => "fprop",
            Self::Dgrad => "dgrad",
            Self::Wgrad => "wgrad",
            Self::Backward => "backward",
        }
    }
}

/// An algorithm, where a family has two.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Way {
    /// An implicit matrix product over rows of pixels.
    Product,
    /// Tiles of neighbouring pixels, their halo fetched once for all taps.
    Spatial,
    /// Products of warpgroups, Hopper's wgmma; of a dense 3×3 convolution on the tiles of [`Spatial`](Self::Spatial), of a
    /// pointwise one's gradients in [`TwoPasses`](Self::TwoPasses).
    Wgmma,
    /// As [`Wgmma`](Self::Wgmma), and what is multiplied as it lies is brought by Hopper's TMA.
    Tma,
    /// Both gradients from one reading of their operands.
    OnePass,
    /// One gradient after the other.
    TwoPasses,
    /// Each by blocks of its own, which are at the same pixels at about the same time.
    Interleaved,
}

const WAYS: [(Way, &str); 7] = [
    (Way::Product, "product"),
    (Way::Spatial, "spatial"),
    (Way::Wgmma, "wgmma"),
    (Way::Tma, "tma"),
    (Way::OnePass, "one-pass"),
    (Way::TwoPasses, "two-passes"),
    (Way::Interleaved, "interleaved"),
];

/// How a launch is made. What it leaves open, and that is all by default, follows from the rule.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Choice {
    /// The algorithm.
    pub way: Option<Way>,
    /// Columns of a block's tile; of a depthwise convolution, of a thread's strip.
    pub columns: Option<u32>,
    /// Blocks that the grid aims at.
    pub blocks: Option<u32>,
    /// Where the rule estimates which of many layouts is the best: the one in this place, from 1.
    pub rank: Option<u32>,
}

impl Choice {
    /// Whether only a device with wgmma can make the launch.
    pub const fn needs_wgmma(&self) -> bool {
        matches!(self.way, Some(Way::Wgmma | Way::Tma))
    }

    /// This algorithm.
    pub const fn by(way: Way) -> Self {
        Self { way: Some(way), columns: None, blocks: None, rank: None }
    }

    /// With tiles, or strips, of so many columns.
    pub const fn columns(self, columns: u32) -> Self {
        Self { columns: Some(columns), ..self }
    }

    /// With the layout of this rank.
    pub const fn rank(self, rank: u32) -> Self {
        Self { rank: Some(rank), ..self }
    }

    /// With about so many blocks.
    pub const fn blocks(self, blocks: u32) -> Self {
        Self { blocks: Some(blocks), ..self }
    }
}

impl Display for Choice {
    /// In words that [`FromStr`] understands: `spatial columns=48`; "rule" where everything is left open.
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let way = self.way.and_then(|way| WAYS.iter().find(|(one, _)| *one == way));
        let words = [
            way.map(|(_, name)| (*name).to_owned()),
            self.columns.map(|columns| format!("columns={columns}")),
            self.blocks.map(|blocks| format!("blocks={blocks}")),
            self.rank.map(|rank| format!("rank={rank}")),
        ];
        let words: Vec<String> = words.into_iter().flatten().collect();
        f.write_str(if words.is_empty() { "rule" } else { "" })?;
        f.write_str(&words.join(" "))
    }
}

impl FromStr for Choice {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut choice = Self::default();
        if text == "rule" {
            return Ok(choice);
        }
        let unknown = |word: &str| format!("`{word}` is nothing that can be chosen");
        let mut words = text.split_whitespace().peekable();
        if words.peek().is_none() {
            return Err("it is empty".into());
        }
        for word in words {
            match word.split_once('=') {
                None => {
                    let way = WAYS.iter().find(|(_, name)| *name == word);
                    choice.way = Some(way.ok_or_else(|| unknown(word))?.0);
                }
                Some((name, number)) => {
                    let number = number.parse().ok().filter(|number| (1..=1 << 20).contains(number));
                    let number = Some(number.ok_or_else(|| unknown(word))?);
                    match name {
                        "columns" => choice.columns = number,
                        "blocks" => choice.blocks = number,
                        "rank" => choice.rank = number,
                        _ => return Err(unknown(word)),
                    }
                }
            }
        }
        Ok(choice)
    }
}

/// The choices for one convolution.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Choices {
    /// Of [`Launch::Fprop`].
    pub fprop: Choice,
    /// Of [`Launch::Dgrad`].
    pub dgrad: Choice,
    /// Of [`Launch::Wgrad`].
    pub wgrad: Choice,
    /// Of [`Launch::Backward`].
    pub backward: Choice,
}

impl Choices {
    /// All by the rules, but for one launch.
    pub fn only(launch: Launch, choice: Choice) -> Self {
        let mut choices = Self::default();
        *choices.of_mut(launch) = choice;
        choices
    }

    fn of_mut(&mut self, launch: Launch) -> &mut Choice {
        match launch {
            Launch::Fprop => &mut self.fprop,
            Launch::Dgrad => &mut self.dgrad,
            Launch::Wgrad => &mut self.wgrad,
            Launch::Backward => &mut self.backward,
        }
    }

    /// Each launch with its choice.
    pub fn each(&self) -> [(Launch, Choice); 4] {
        let Self { fprop, dgrad, wgrad, backward } = *self;
        let launches = [Launch::Fprop, Launch::Dgrad, Launch::Wgrad, Launch::Backward];
        let choices = [fprop, dgrad, wgrad, backward];
        std::array::from_fn(|i| (launches[i], choices[i]))
    }

    /// Refuses what the device does not have.
    pub(super) fn check_device(&self, operation: &'static str, device: &Device) -> Result<()> {
        let each = self.each();
        let needs = each.iter().find(|(_, choice)| choice.needs_wgmma() && !device.has_wgmma());
        let Some((_, choice)) = needs else { return Ok(()) };
        let problem = format!("a tuning chooses `{choice}`, which {} does not have", device.gpu().name);
        Err(Error::Shape { operation, problem })
    }

    /// Refuses what is none of the `possible` choices of its launch.
    pub(super) fn check(
        &self,
        operation: &'static str,
        possible: impl Fn(Launch) -> Vec<Choice>,
    ) -> Result<()> {
        for (launch, choice) in self.each() {
            let possible = possible(launch);
            if choice != Choice::default() && !possible.contains(&choice) {
                let possible: Vec<String> = possible.iter().map(Choice::to_string).collect();
                let problem = format!(
                    "a tuning chooses `{choice}` for {}, which can only be one of: {}",
                    launch.name(),
                    possible.join(", ")
                );
                return Err(Error::Shape { operation, problem });
            }
        }
        Ok(())
    }
}

/// A launch in the words of a tuning.
pub fn key(conv: &Conv, x: Shape, dtype: Dtype, launch: Launch) -> String {
    let Conv { kind, kernel, stride, padding, inputs, outputs } = *conv;
    let kind = match kind {
        ConvKind::Dense => "dense",
        ConvKind::Depthwise => "depthwise",
        ConvKind::Pointwise => "pointwise",
    };
    let padding = match padding {
        Padding::Same => "same",
        Padding::Symmetric => "symmetric",
    };
    // Without a border all padding is alike.
    let border = if kernel == 1 { String::new() } else { format!(" /{stride} {padding}") };
    let Shape { n, h, w, .. } = x;
    format!("{} {dtype}: {kind} {kernel}×{kernel} {inputs}→{outputs}{border}, {n} of {h}×{w}", launch.name())
}

/// A choice and what it gained.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Entry {
    /// The [`Choice`] in words.
    pub choice: String,
    /// Milliseconds by the rule.
    pub rule_ms: f64,
    /// Milliseconds by the choice.
    pub ms: f64,
}

/// Choices for the launches of one GPU.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Tuning {
    schema: u32,
    /// Of this crate: another one may have other kernels.
    version: String,
    /// The GPU's name.
    pub gpu: String,
    /// CUDA's version of its driver, `major.minor`.
    pub driver: String,
    /// The command and the commit that it was measured by.
    pub source: String,
    /// By [`key`].
    pub launches: BTreeMap<String, Entry>,
    #[serde(skip)]
    choices: BTreeMap<String, Choice>,
}

impl Tuning {
    /// Without choices: for `device`, measured as `source` says.
    ///
    /// # Errors
    /// [`Error::Driver`].
    pub fn of(device: &Device, source: String) -> Result<Self> {
        Ok(Self {
            schema: SCHEMA,
            version: env!("CARGO_PKG_VERSION").into(),
            gpu: device.gpu().name.clone(),
            driver: version(device)?,
            source,
            launches: BTreeMap::new(),
            choices: BTreeMap::new(),
        })
    }

    /// Adds a choice for a launch.
    pub fn add(&mut self, key: String, choice: Choice, [rule_ms, ms]: [f64; 2]) {
        self.launches.insert(key.clone(), Entry { choice: choice.to_string(), rule_ms, ms });
        self.choices.insert(key, choice);
    }

    /// The choices for a convolution; the rules, where there is none.
    pub fn choices(&self, conv: &Conv, x: Shape, dtype: Dtype) -> Choices {
        let mut choices = Choices::default();
        if self.choices.is_empty() {
            return choices;
        }
        for (launch, _) in choices.each() {
            if let Some(choice) = self.choices.get(&key(conv, x, dtype, launch)) {
                *choices.of_mut(launch) = *choice;
            }
        }
        choices
    }

    /// Reads a file.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::File`] for what is no tuning, or one of another version of this crate.
    pub fn read(path: &Path) -> Result<Arc<Self>> {
        let text = fs::read_to_string(path).map_err(Error::io(path, "read"))?;
        let wrong = |problem: String| Error::file(path, problem);
        let mut tuning: Self =
            serde_json::from_str(&text).map_err(|error| wrong(format!("is no tuning: {error}")))?;
        let here = env!("CARGO_PKG_VERSION");
        if (tuning.schema, tuning.version.as_str()) != (SCHEMA, here) {
            return Err(wrong(format!(
                "is a tuning of effnetv2 {}, format {}; this is {here}, format {SCHEMA}. `effnetv2 bench tune` measures \
                 anew",
                tuning.version, tuning.schema
            )));
        }
        for (key, entry) in &tuning.launches {
            let choice = entry.choice.parse().map_err(|problem| wrong(format!("{key}: {problem}")))?;
            tuning.choices.insert(key.clone(), choice);
        }
        Ok(Arc::new(tuning))
    }

    /// Writes a file, over what was there.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn write(&self, path: &Path) -> Result<()> {
        let mut text =
            serde_json::to_string_pretty(self).map_err(|error| Error::file(path, error.to_string()))?;
        text.push('\n');
        fs::write(path, text).map_err(Error::io(path, "write"))
    }

    /// Refuses another GPU than the one it was measured on, or another driver.
    ///
    /// # Errors
    /// [`Error::File`] about `path`, which it was read from; [`Error::Driver`].
    pub fn check(&self, device: &Device, path: &Path) -> Result<()> {
        let here = [device.gpu().name.clone(), version(device)?];
        if here == [self.gpu.as_str(), &self.driver] {
            return Ok(());
        }
        let problem = format!(
            "was measured on {} with a driver of CUDA {}; this is {} with CUDA {}, where others may be the fastest. \
             `effnetv2 bench tune` measures here",
            self.gpu, self.driver, here[0], here[1]
        );
        Err(Error::file(path, problem))
    }
}

fn version(device: &Device) -> Result<String> {
    let (major, minor) = device.driver()?;
    Ok(format!("{major}.{minor}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    const CONV: Conv =
        Conv { kind: ConvKind::Dense, kernel: 3, stride: 2, padding: Padding::Same, inputs: 24, outputs: 96 };

    fn tuning() -> Tuning {
        Tuning {
            schema: SCHEMA,
            version: env!("CARGO_PKG_VERSION").into(),
            gpu: "a GPU".into(),
            driver: "13.0".into(),
            source: "test".into(),
            launches: BTreeMap::new(),
            choices: BTreeMap::new(),
        }
    }

    #[test]
    fn choices_are_written_in_words() {
        let ways = WAYS.map(|(way, _)| Choice::by(way));
        let others = [
            Choice::default(),
            Choice::default().blocks(7),
            Choice::by(Way::Spatial).columns(48).blocks(9).rank(2),
        ];
        for choice in ways.into_iter().chain(others) {
            assert_eq!(choice.to_string().parse(), Ok(choice), "{choice}");
        }
        assert_eq!(Choice::by(Way::Spatial).columns(48).to_string(), "spatial columns=48");
        for wrong in
            ["", " ", "fast", "columns", "columns=", "columns=0", "rows=3", "blocks=-1", "rule product"]
        {
            assert!(wrong.parse::<Choice>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn every_launch_has_words_of_its_own() {
        let x = Shape::new(256, 75, 75, 24);
        let said = key(&CONV, x, Dtype::Bf16, Launch::Fprop);
        assert_eq!(said, "fprop bf16: dense 3×3 24→96 /2 same, 256 of 75×75");
        let others = [
            key(&CONV, x, Dtype::F16, Launch::Fprop),
            key(&CONV, x, Dtype::Bf16, Launch::Wgrad),
            key(&CONV, Shape::new(128, 75, 75, 24), Dtype::Bf16, Launch::Fprop),
            key(&Conv { padding: Padding::Symmetric, ..CONV }, x, Dtype::Bf16, Launch::Fprop),
            key(&Conv { stride: 1, ..CONV }, x, Dtype::Bf16, Launch::Fprop),
        ];
        assert!(others.iter().all(|other| *other != said));
    }

    #[test]
    fn a_file_comes_back_and_its_choices_hold() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("tuning.json");
        let (x, choice) = (Shape::new(2, 9, 9, 24), Choice::by(Way::Product).columns(64));
        let mut written = tuning();
        written.add(key(&CONV, x, Dtype::Bf16, Launch::Dgrad), choice, [2.0, 1.5]);
        written.write(&path).unwrap();
        let read = Tuning::read(&path).unwrap();
        assert_eq!(*read, written);
        assert_eq!(read.choices(&CONV, x, Dtype::Bf16), Choices::only(Launch::Dgrad, choice));
        assert_eq!(read.choices(&CONV, x, Dtype::F16), Choices::default());
        assert_eq!(read.choices(&CONV, Shape::new(3, 9, 9, 24), Dtype::Bf16), Choices::default());
    }

    #[test]
    fn what_is_no_tuning_of_this_version_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("tuning.json");
        let refuse = |text: &str, says: &str| {
            fs::write(&path, text).unwrap();
            let message = Tuning::read(&path).unwrap_err().to_string();
            assert!(message.contains("tuning.json") && message.contains(says), "{message}");
        };
        refuse("{}", "is no tuning");
        refuse("nonsense", "is no tuning");
        let old = Tuning { version: "0.0.1".into(), ..tuning() };
        refuse(&serde_json::to_string(&old).unwrap(), "of effnetv2 0.0.1");
        let mut odd = tuning();
        odd.launches.insert("x".into(), Entry { choice: "quick".into(), rule_ms: 1.0, ms: 1.0 });
        refuse(&serde_json::to_string(&odd).unwrap(), "x: `quick` is nothing that can be chosen");
        assert!(matches!(Tuning::read(&folder.path().join("none")), Err(Error::Io { .. })));
    }
}
