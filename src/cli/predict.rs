//! `predict`: what is on a picture.

use crate::backend::{Backend, Mode, Variables};
use crate::data::transform::Scratch;
use crate::data::{MixPlan, read_image};
use crate::model::Architecture;
use crate::nn::Network;
use crate::reference::Reference;
use crate::report::table::percent;
use crate::train::checkpoint::Checkpoint;
use crate::train::evaluate::{ranking, softmax};
use crate::{Error, Result};
use serde::Serialize;
use std::path::{Path, PathBuf};

/// Classifies image files (JPEG, PNG) with a checkpoint: the most probable classes with their probabilities. A file that
/// cannot be decoded is named on standard error and makes the exit code 1; the others are classified all the same.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The checkpoint, or the folder of its run.
    checkpoint: PathBuf,
    /// The images.
    #[arg(required = true)]
    images: Vec<PathBuf>,
    /// How many classes to name.
    #[arg(long, default_value_t = 5)]
    top: usize,
    /// One JSON object a line instead of text.
    #[arg(long)]
    json: bool,
    /// Side of the images in pixels [default: as in training].
    #[arg(long, value_name = "PIXELS")]
    size: Option<usize>,
    /// Which weights.
    #[arg(long, value_enum, default_value_t)]
    weights: super::Weights,
    /// Stop at the first image that cannot be decoded.
    #[arg(long)]
    strict: bool,
    /// Threads; 0 for one per processor.
    #[arg(long, default_value_t = 0)]
    threads: usize,
}

/// The classes of one image, most probable first.
#[derive(Serialize)]
struct Prediction<'a> {
    image: &'a Path,
    classes: Vec<Candidate<'a>>,
}

#[derive(Serialize)]
struct Candidate<'a> {
    class: &'a str,
    probability: f64,
}

/// A checkpoint ready to classify.
struct Classifier {
    checkpoint: Checkpoint,
    backend: Reference<f32>,
    network: Network,
    vars: Variables<Reference<f32>>,
    size: usize,
}

pub(super) fn run(args: &Args) -> Result<()> {
    super::limit_threads(args.threads)?;
    if args.top == 0 {
        return Err(Error::usage("--top", 0, "must be at least 1"));
    }
    let checkpoint = Checkpoint::read(&args.checkpoint)?;
    let backend = Reference::<f32>::new();
    let network = checkpoint.network()?;
    let vars = checkpoint.weights(&backend, &network, args.weights.into())?;
    let size = super::image_side(args.size, checkpoint.description.config.eval_size)?;
    let mut classifier = Classifier { checkpoint, backend, network, vars, size };
    let mut failed = 0;
    for image in &args.images {
        match classifier.classify(image, args.top) {
            Ok(prediction) if args.json => {
                let line =
                    serde_json::to_string(&prediction).map_err(|e| Error::file(image, e.to_string()))?;
                println!("{line}");
            }
            Ok(prediction) => {
                println!("{}", image.display());
                for Candidate { class, probability } in prediction.classes {
                    println!("  {:>8}  {class}", percent(probability));
                }
            }
            Err(error) if args.strict => return Err(error),
            Err(error) => {
                eprintln!("{error}");
                failed += 1;
            }
        }
    }
    if failed > 0 {
        let problem = format!("{failed} of {} images could not be classified; see above", args.images.len());
        return Err(Error::Training(problem));
    }
    Ok(())
}

impl Classifier {
    fn classify<'a>(&'a mut self, path: &'a Path, top: usize) -> Result<Prediction<'a>> {
        let config = &self.checkpoint.description.config;
        let image = read_image(path)?;
        let mut pixels = vec![0; self.size * self.size * 3];
        config.eval_images.apply(&image, self.size, &mut Scratch::default(), &mut pixels)?;
        let normalisation = Architecture::find(&config.model)?.normalisation;
        let x = self.backend.input(&pixels, self.size, &normalisation, &MixPlan::none(1))?;
        let pass = self.network.forward(&mut self.backend, x, &mut self.vars, Mode::Eval, 0.0)?;
        let logits = self.backend.logits(&pass.head)?;
        let probabilities = softmax(&logits);
        let candidate = |class: usize| Candidate {
            class: &self.checkpoint.description.classes[class],
            probability: probabilities[class],
        };
        let classes = ranking(&logits).into_iter().take(top).map(candidate).collect();
        Ok(Prediction { image: path, classes })
    }
}
