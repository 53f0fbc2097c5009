//! A training run on the terminal: a bar for the epoch under way, a line for each epoch done.
//!
//! Whoever stops reading these lines does not stop the run: what they say is in its metrics too.

use super::output::say;
use crate::train::Observer;
use crate::train::evaluate::Scores;
use crate::train::progressive::Stage;
use crate::train::run::{EpochRecord, StepRecord};
use indicatif::{ProgressBar, ProgressStyle};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// Reports a run; the bar goes to standard error and only to a terminal.
pub(super) struct Terminal {
    stop: Arc<AtomicBool>,
    epochs: u32,
    stage: Option<usize>,
    bar: ProgressBar,
}

impl Terminal {
    pub(super) fn new(stop: Arc<AtomicBool>, epochs: u32) -> Self {
        Self { stop, epochs, stage: None, bar: ProgressBar::hidden() }
    }
}

/// A bar of `length` items called `unit`.
pub(super) fn bar(length: usize, unit: &str) -> ProgressBar {
    let template = format!("{{prefix}} [{{bar:30}}] {{pos}}/{{len}} {unit}, {{eta}} left {{msg}}");
    let style = ProgressStyle::with_template(&template).unwrap_or_else(|_| ProgressStyle::default_bar());
    let bar = ProgressBar::new(length as u64).with_style(style.progress_chars("=> "));
    bar.enable_steady_tick(Duration::from_millis(200));
    bar
}

fn accuracy(scores: Option<Scores>) -> String {
    scores.map_or_else(|| "-".into(), |s| format!("{:.2} %", 100.0 * s.top1))
}

impl Observer for Terminal {
    fn stage(&mut self, stage: &Stage, stages: usize) {
        if self.stage.replace(stage.index) == Some(stage.index) {
            return;
        }
        let strength = &stage.regularisation;
        let _ = say!(
            "stage {} of {stages}: {} px, dropout {:.2}, RandAugment {:.1}, mixup {:.2}, CutMix {:.2}",
            stage.index + 1,
            stage.image_size,
            strength.dropout,
            strength.randaugment,
            strength.mixup_alpha,
            strength.cutmix_alpha
        );
    }

    fn epoch_begins(&mut self, epoch: u32, done: usize, batches: usize) {
        self.bar = bar(batches, "steps");
        self.bar.set_prefix(format!("epoch {:>3}/{}", epoch + 1, self.epochs));
        self.bar.set_position(done as u64);
    }

    fn step(&mut self, record: &StepRecord) {
        self.bar.set_message(format!("loss {:.4}, lr {:.2e}", record.loss, record.learning_rate));
        self.bar.inc(1);
    }

    fn epoch(&mut self, record: &EpochRecord) {
        self.bar.finish_and_clear();
        let _ = say!(
            "epoch {:>3}/{}  train loss {:.4}  validation top-1 {}, averaged weights {}  {:.0} images/s",
            record.epoch + 1,
            self.epochs,
            record.train_loss,
            accuracy(record.weights),
            accuracy(record.average),
            record.images_per_second
        );
    }

    fn should_stop(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}
