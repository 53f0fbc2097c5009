//! A run that is killed and resumed ends as one that was never broken, byte for byte.
#![cfg(unix)]

mod runs;

use effnetv2::train::run::{CHECKPOINT, METRICS};
use runs::{effnetv2, lines, program, succeed, untrained, wait_until, write};
use serde_json::Value;
use std::fs;
use std::path::Path;
use tempfile::TempDir;

/// Three epochs of seven steps in two stages, with everything that is random switched on.
const RUN: &str = "model = 'nano'\nepochs = 3\nbatch = 192\nwarmup_epochs = 1.0\ncheckpoint_every = 3\n\
    [progressive]\nstages = 2\nimage_size = [32, 40]\ncutmix_alpha = [0.5, 1.0]\nmixup_alpha = [0.2, 0.4]\n";

fn folder() -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    write(folder.path(), "run.toml", RUN);
    folder
}

/// The run in the folder `name`, from start to end.
fn unbroken(here: &Path, name: &str, more: &[&str]) {
    succeed(here, &[&["train", "--config", "run.toml", "--out", name], more].concat());
}

fn checkpoint(run: &Path) -> Vec<u8> {
    fs::read(run.join(CHECKPOINT)).unwrap()
}

/// The metrics without the one figure that is a time.
fn metrics(run: &Path) -> Vec<Value> {
    let text = fs::read_to_string(run.join(METRICS)).unwrap();
    let record = |line: &str| {
        let mut record: Value = serde_json::from_str(line).unwrap();
        record.as_object_mut().unwrap().remove("images_per_second");
        record
    };
    text.lines().map(record).collect()
}

/// Starts `args` and kills it once the metrics of `run` have `records` lines.
fn kill_after(here: &Path, args: &[&str], run: &Path, records: usize) {
    let mut child = program(here, args).spawn().unwrap();
    wait_until("a few steps", || lines(&run.join(METRICS)) >= records);
    child.kill().unwrap();
    assert_eq!(child.wait().unwrap().code(), None, "killed before it ended");
}

fn assert_same(here: &Path, broken: &str) {
    let (whole, broken) = (here.join("whole"), here.join(broken));
    assert_eq!(metrics(&whole), metrics(&broken), "{}", broken.display());
    assert!(checkpoint(&whole) == checkpoint(&broken), "{}: the checkpoints differ", broken.display());
}

#[test]
fn a_killed_run_goes_on_as_if_nothing_had_been() {
    let folder = folder();
    let here = folder.path();
    unbroken(here, "whole", &[]);
    assert_eq!(metrics(&here.join("whole")).len(), 3 * (7 + 1));
    // An epoch writes seven steps and itself: in mid-epoch, at its last step, just after it, in the second stage.
    for records in [4, 7, 8, 13] {
        let (name, run) = (format!("broken-{records}"), here.join(format!("broken-{records}")));
        kill_after(here, &["train", "--config", "run.toml", "--out", &name], &run, records);
        succeed(here, &["train", "--resume", &name]);
        assert_same(here, &name);
    }
    // Killed twice. What came after the checkpoint is dropped first, so the count of records goes down before it goes up.
    let run = here.join("twice");
    kill_after(here, &["train", "--config", "run.toml", "--out", "twice"], &run, 4);
    kill_after(here, &["train", "--resume", "twice"], &run, 12);
    succeed(here, &["train", "--resume", "twice/checkpoint.safetensors"]);
    assert_same(here, "twice");
    succeed(here, &["train", "--resume", "twice"]);
    assert_same(here, "twice");
}

#[test]
fn before_the_first_checkpoint_there_is_nothing_to_resume() {
    let folder = folder();
    let (here, run) = (folder.path(), folder.path().join("broken"));
    // One epoch of ninety steps: time enough to be killed in.
    let long = ["--checkpoint-every", "0", "--epochs", "1", "--progressive", "1", "--batch", "16"];
    kill_after(here, &[&["train", "--config", "run.toml", "--out", "broken"], &long[..]].concat(), &run, 1);
    assert!(!run.join(CHECKPOINT).exists());
    let outcome = effnetv2(here, &["train", "--resume", "broken"]);
    assert_eq!(outcome.code, Some(1));
    assert!(outcome.err.contains("this run ended before its first checkpoint"), "{}", outcome.err);
    // What the message advises.
    unbroken(here, "whole", &long);
    succeed(here, &["train", "--config", "broken/config.toml", "--out", "again"]);
    assert_same(here, "again");
}

/// Resuming truncates the metrics to the checkpoint: a record of an epoch whose evaluation the checkpoint does not know
/// of is written a second time, not twice.
#[test]
fn metrics_after_the_checkpoint_are_dropped() {
    let folder = folder();
    let here = folder.path();
    for name in ["whole", "broken"] {
        untrained(&here.join(name), |_| {});
    }
    let scores = "{\"images\":9,\"loss\":null,\"top1\":0.5,\"top5\":0.5}";
    let later = format!(
        "{{\"kind\":\"step\",\"step\":1,\"epoch\":0,\"loss\":9.5,\"learning_rate\":0.5,\"gradient_norm\":1.0,\
         \"image_size\":32}}\n{{\"kind\":\"epoch\",\"step\":0,\"epoch\":0,\"train_loss\":9.5,\"weights\":{scores},\
         \"average\":{scores},\"images_per_second\":1.0}}\n{{\"kind\":\"st"
    );
    write(&here.join("broken"), METRICS, &later);
    for name in ["whole", "broken"] {
        succeed(here, &["train", "--resume", name]);
    }
    assert_same(here, "broken");
}

#[test]
fn the_seed_decides_everything_and_the_threads_nothing() {
    let folder = folder();
    let here = folder.path();
    unbroken(here, "whole", &["--threads", "2"]);
    unbroken(here, "one-thread", &["--threads", "1"]);
    assert_same(here, "one-thread");
    unbroken(here, "other-seed", &["--threads", "2", "--seed", "1"]);
    assert_ne!(metrics(&here.join("whole"))[0], metrics(&here.join("other-seed"))[0]);
    assert!(checkpoint(&here.join("whole")) != checkpoint(&here.join("other-seed")));
}
