//! `predict`: what is on a picture.

use super::compute::Work;
use super::inference::{Inference, Model};
use super::output::{note, say};
use crate::backend::Backend;
use crate::data::transform::Scratch;
use crate::data::{MixPlan, read_image};
use crate::report::table::percent;
use crate::train::checkpoint::Checkpoint;
use crate::train::evaluate::{ranking, softmax};
use crate::{Error, Result};
use serde::Serialize;
use std::borrow::Cow;
use std::path::{Path, PathBuf};

/// Classify image files with a checkpoint.
///
/// Names the most probable classes of each JPEG or PNG file with their probabilities. A file that cannot be decoded is
/// named on standard error and makes the exit code 1; the others are classified all the same.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    #[command(flatten)]
    inference: Inference,
    /// The images.
    #[arg(required = true)]
    images: Vec<PathBuf>,
    /// How many classes to name.
    #[arg(long, default_value_t = 5)]
    top: usize,
    /// One JSON object a line instead of text.
    #[arg(long)]
    json: bool,
    /// Stop at the first image that cannot be decoded.
    #[arg(long)]
    strict: bool,
}

/// The classes of one image, most probable first.
#[derive(Serialize)]
struct Prediction<'a> {
    image: Cow<'a, str>,
    classes: Vec<Candidate<'a>>,
}

#[derive(Serialize)]
struct Candidate<'a> {
    class: &'a str,
    probability: f64,
}

pub(super) fn run(args: &Args) -> Result<()> {
    if args.top == 0 {
        return Err(Error::usage("--top", 0, "must be at least 1"));
    }
    let (checkpoint, dtype) = args.inference.checkpoint()?;
    // What it prints is for programs to read: nothing but predictions.
    args.inference.compute.run(dtype, true, Predictions { args, checkpoint })
}

struct Predictions<'a> {
    args: &'a Args,
    checkpoint: Checkpoint,
}

impl Work for Predictions<'_> {
    type Output = ();

    fn on<B: Backend<Element = f32>>(self, backend: B) -> Result<()> {
        let model = self.args.inference.model(self.checkpoint, backend, 1)?;
        predict_all(self.args, model)
    }
}

fn predict_all<B: Backend<Element = f32>>(args: &Args, mut model: Model<B>) -> Result<()> {
    let mut failed = 0;
    for path in &args.images {
        match model.classify(path, args.top) {
            Ok(prediction) if args.json => {
                let line =
                    serde_json::to_string(&prediction).map_err(|e| Error::file(path, e.to_string()))?;
                say!("{line}")?;
            }
            Ok(prediction) => {
                say!("{}", prediction.image)?;
                for Candidate { class, probability } in prediction.classes {
                    say!("  {:>8}  {class}", percent(probability))?;
                }
            }
            Err(error) if args.strict => return Err(error),
            Err(error) => {
                note!("{error}");
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

impl<B: Backend<Element = f32>> Model<B> {
    fn classify<'a>(&'a mut self, path: &'a Path, top: usize) -> Result<Prediction<'a>> {
        let image = read_image(path)?;
        let mut pixels = vec![0; self.size * self.size * 3];
        let transform = self.checkpoint.description.config.eval_images;
        transform.apply(&image, self.size, &mut Scratch::default(), &mut pixels)?;
        let x = self.backend.load(&pixels, self.size, &self.normalisation, &MixPlan::none(1))?;
        let head = self.network.infer(&mut self.backend, x, &mut self.vars)?;
        let logits = self.backend.logits(&head)?;
        let probabilities = softmax(&logits);
        let classes = self.classes();
        let candidate =
            |class: usize| Candidate { class: &classes[class], probability: probabilities[class] };
        let classes = ranking(&logits).into_iter().take(top).map(candidate).collect();
        Ok(Prediction { image: path.to_string_lossy(), classes })
    }
}
