//! What the tests of the program share: runs small enough for a test, and the program itself.
#![allow(dead_code, reason = "each test program uses a part")]

use effnetv2::data::digits;
use effnetv2::model::initial_values;
use effnetv2::nn::Network;
use effnetv2::reference::Reference;
use effnetv2::train::TrainConfig;
use effnetv2::train::checkpoint::{self, Description, FORMAT_VERSION, Position, State};
use effnetv2::train::run::{CHECKPOINT, RunFolder};
use image::{Rgb, RgbImage};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

/// `effnetv2` in `folder`, to be spawned; its output is kept.
pub(crate) fn program(folder: &Path, args: &[&str]) -> Command {
    // Elsewhere than where they were built, the tests are told where it is.
    let path = std::env::var("EFFNETV2_TEST_PROGRAM");
    let mut command = Command::new(path.unwrap_or_else(|_| env!("CARGO_BIN_EXE_effnetv2").into()));
    command.current_dir(folder).args(args).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

/// How the program ended and what it said.
#[derive(Debug)]
pub(crate) struct Outcome {
    /// None when a signal ended it.
    pub(crate) code: Option<i32>,
    pub(crate) out: String,
    pub(crate) err: String,
}

impl From<Output> for Outcome {
    fn from(output: Output) -> Self {
        let text = |bytes| String::from_utf8(bytes).expect("the program writes UTF-8");
        Self { code: output.status.code(), out: text(output.stdout), err: text(output.stderr) }
    }
}

/// Runs `effnetv2` in `folder` to its end; whatever happens it must not panic.
pub(crate) fn effnetv2(folder: &Path, args: &[&str]) -> Outcome {
    let outcome = Outcome::from(program(folder, args).output().expect("the program starts"));
    assert!(!outcome.err.contains("panicked"), "{args:?}: {}", outcome.err);
    outcome
}

/// Runs `effnetv2` in `folder`, which must end well; gives its standard output.
pub(crate) fn succeed(folder: &Path, args: &[&str]) -> String {
    let outcome = effnetv2(folder, args);
    assert_eq!(outcome.code, Some(0), "{args:?}: {outcome:?}");
    outcome.out
}

/// Writes `text` to `folder/name`.
pub(crate) fn write(folder: &Path, name: &str, text: &str) {
    std::fs::write(folder.join(name), text).expect("a file in a temporary folder");
}

/// `nano` on the digits at 32 pixels, untrained, as a run of two epochs of 11 steps in the folder `path`. `change` may
/// spoil what the checkpoint says of itself.
pub(crate) fn untrained(path: &Path, change: impl FnOnce(&mut Description)) -> PathBuf {
    let mut config = TrainConfig::recipe("nano", "digits").expect("a recipe");
    (config.epochs, config.batch, config.warmup_epochs) = (2, 128, 1.0);
    (config.progressive.stages, config.progressive.image_size) = (1, [32, 32]);
    let classes = digits::open().train.classes().to_vec();
    let network = Network::new(config.network(classes.len()).expect("a network"));
    let (params, stats) = initial_values(network.layout(), 0);
    let state = State::new(&Reference::<f32>::new(), config.optimizer, params, stats).expect("a state");
    let folder = RunFolder::create(path, &config).expect("a new folder");
    let position = Position::default();
    let (format_version, dtype, loss_scale) = (FORMAT_VERSION, None, None);
    let mut description = Description { format_version, config, classes, position, dtype, loss_scale };
    change(&mut description);
    let file = folder.file(CHECKPOINT);
    checkpoint::write(&file, &Reference::<f32>::new(), network.layout(), &state, &description)
        .expect("a checkpoint");
    file
}

/// Two classes, `blue` and `red`, of four training images and one for validation.
pub(crate) fn images(root: &Path) {
    for (class, color) in [("blue", [10, 10, 250]), ("red", [250, 10, 10])] {
        for place in ["train", "val"].map(|part| root.join(part).join(class)) {
            fs::create_dir_all(&place).unwrap();
            let count = if place.starts_with(root.join("train")) { 4 } else { 1 };
            for number in 0..count {
                let file = place.join(format!("{number}.png"));
                RgbImage::from_pixel(40, 36, Rgb(color)).save(file).unwrap();
            }
        }
    }
}

/// A run of four steps on them.
pub(crate) const ON_IMAGES: [&str; 13] = [
    "train", "--model", "nano", "--data", "data", "--size", "32", "--batch", "4", "--epochs", "2", "--out",
    "run",
];

/// Waits until `holds`, at most a minute.
pub(crate) fn wait_until(what: &str, mut holds: impl FnMut() -> bool) {
    let start = std::time::Instant::now();
    while !holds() {
        assert!(start.elapsed().as_secs() < 60, "waited a minute for {what}");
        std::thread::sleep(std::time::Duration::from_millis(2));
    }
}

/// How many whole lines the file has; none when it does not exist.
pub(crate) fn lines(path: &Path) -> usize {
    std::fs::read_to_string(path).map_or(0, |text| text.matches('\n').count())
}
