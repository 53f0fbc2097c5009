//! `eval`: how good a checkpoint is.

use super::compute::Work;
use super::inference::{Inference, Model};
use super::output::say;
use super::progress::bar;
use super::train::report_problems;
use crate::Result;
use crate::backend::Backend;
use crate::data::{BadImages, Loader, LoaderConfig, Pipeline, Source, open};
use crate::report::table::{percent, thousands};
use crate::train::checkpoint::Checkpoint;
use crate::train::evaluate::evaluate;
use std::path::PathBuf;

/// Evaluate a checkpoint: accuracy, loss, confusion matrix.
///
/// Looks at every validation image of a dataset, and draws which classes are taken for which.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    #[command(flatten)]
    inference: Inference,
    /// The dataset [default: the one it was trained on].
    #[arg(long, value_name = "DATA")]
    data: Option<String>,
    /// Images at a time.
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..))]
    batch: u32,
    /// Where to draw the confusion matrix [default: confusion.svg beside the checkpoint].
    #[arg(long, value_name = "FILE")]
    confusion: Option<PathBuf>,
    /// Stop at an image that cannot be decoded instead of passing over it.
    #[arg(long)]
    strict: bool,
}

pub(super) fn run(args: &Args) -> Result<()> {
    let (checkpoint, dtype) = args.inference.checkpoint()?;
    args.inference.compute.run(dtype, false, Evaluation { args, checkpoint })
}

struct Evaluation<'a> {
    args: &'a Args,
    checkpoint: Checkpoint,
}

impl Work for Evaluation<'_> {
    type Output = ();

    fn on<B: Backend<Element = f32>>(self, backend: B) -> Result<()> {
        let model = self.args.inference.model(self.checkpoint, backend, self.args.batch as usize)?;
        evaluate_all(self.args, model)
    }
}

fn evaluate_all<B: Backend<Element = f32>>(args: &Args, mut model: Model<B>) -> Result<()> {
    let description = model.checkpoint.description.clone();
    let config = description.config;
    let bad_images = if args.strict { BadImages::Fail } else { BadImages::Skip };
    let splits = open(&Source::parse(args.data.as_ref().unwrap_or(&config.data))?, bad_images)?;
    model.check_classes(splits.validation.name(), splits.validation.classes())?;
    let loader = LoaderConfig {
        batch: args.batch as usize,
        size: model.size,
        seed: 0,
        threads: rayon::current_num_threads(),
        prefetch: 2,
        bad_images,
        pipeline: Pipeline::Eval(config.eval_images),
    };
    let loader = Loader::new(splits.validation.clone(), loader)?;
    let progress = bar(splits.validation.len(), "images");
    let counted = |images: usize| {
        progress.inc(images as u64);
        Ok(())
    };
    let Model { backend, network, vars, normalisation, .. } = &mut model;
    let outcome = evaluate(backend, network, vars, &loader, normalisation, counted);
    progress.finish_and_clear();
    report_problems(&splits);
    let (scores, confusion) = outcome?;
    let path = model.checkpoint.path();
    say!("{}: {} after step {}", path.display(), config.model, description.position.step)?;
    say!("{} images of {} at {} px", thousands(scores.images), splits.validation.name(), model.size)?;
    say!("top-1 {}   top-5 {}   loss {:.4}", percent(scores.top1), percent(scores.top5), scores.loss)?;
    let picture = args.confusion.clone().unwrap_or_else(|| path.with_file_name("confusion.svg"));
    confusion.write(&picture)?;
    say!("confusion matrix: {}", picture.display())
}
