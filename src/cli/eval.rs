//! `eval`: how good a checkpoint is.

use super::progress::bar;
use super::train::report_problems;
use crate::data::{BadImages, Loader, LoaderConfig, Pipeline, Source, open};
use crate::model::Architecture;
use crate::reference::Reference;
use crate::report::table::{percent, thousands};
use crate::train::checkpoint::Checkpoint;
use crate::train::evaluate::evaluate;
use crate::{Error, Result};
use std::path::PathBuf;

/// Evaluates a checkpoint on the validation images of a dataset: top-1 and top-5 accuracy, loss, confusion matrix.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The checkpoint, or the folder of its run.
    checkpoint: PathBuf,
    /// The dataset [default: the one it was trained on].
    #[arg(long, value_name = "DATA")]
    data: Option<String>,
    /// Side of the images in pixels [default: as in training].
    #[arg(long, value_name = "PIXELS")]
    size: Option<usize>,
    /// Images at a time.
    #[arg(long, default_value_t = 64)]
    batch: usize,
    /// Which weights.
    #[arg(long, value_enum, default_value_t)]
    weights: super::Weights,
    /// Where to draw the confusion matrix [default: confusion.svg beside the checkpoint].
    #[arg(long, value_name = "FILE")]
    confusion: Option<PathBuf>,
    /// Stop at an image that cannot be decoded instead of passing over it.
    #[arg(long)]
    strict: bool,
    /// Threads; 0 for one per processor.
    #[arg(long, default_value_t = 0)]
    threads: usize,
}

pub(super) fn run(args: &Args) -> Result<()> {
    super::limit_threads(args.threads)?;
    super::announce_device();
    let checkpoint = Checkpoint::read(&args.checkpoint)?;
    let config = &checkpoint.description.config;
    let bad_images = if args.strict { BadImages::Fail } else { BadImages::Skip };
    let splits = open(&Source::parse(args.data.as_ref().unwrap_or(&config.data))?, bad_images)?;
    let (found, known) = (splits.validation.classes(), &checkpoint.description.classes);
    if found != known {
        let problem = format!(
            "its {} classes are not the {} of {}; use data with the same classes",
            found.len(),
            known.len(),
            checkpoint.path().display()
        );
        return Err(Error::usage("--data", splits.validation.name(), problem));
    }
    let mut backend = Reference::<f32>::new();
    let network = checkpoint.network()?;
    let mut vars = checkpoint.weights(&backend, &network, args.weights.into())?;
    let size = super::image_side(args.size, config.eval_size)?;
    let pipeline = Pipeline::Eval(config.eval_images);
    let loader =
        LoaderConfig { batch: args.batch, size, seed: 0, threads: 0, prefetch: 2, bad_images, pipeline };
    let loader = Loader::new(splits.validation.clone(), loader)?;
    let normalisation = Architecture::find(&config.model)?.normalisation;
    let progress = bar(splits.validation.len(), "images");
    let counted = |images: usize| progress.inc(images as u64);
    let outcome = evaluate(&mut backend, &network, &mut vars, &loader, &normalisation, counted);
    progress.finish_and_clear();
    report_problems(&splits);
    let (scores, confusion) = outcome?;
    println!(
        "{}: {} after step {}",
        checkpoint.path().display(),
        config.model,
        checkpoint.description.position.step
    );
    println!("{} images of {} at {size} px", thousands(scores.images), splits.validation.name());
    println!("top-1 {}   top-5 {}   loss {:.4}", percent(scores.top1), percent(scores.top5), scores.loss);
    let picture = args.confusion.clone().unwrap_or_else(|| checkpoint.path().with_file_name("confusion.svg"));
    confusion.write(&picture)?;
    println!("confusion matrix: {}", picture.display());
    Ok(())
}
