//! The loader: an order per epoch, batches prepared ahead on a pool of threads, delivered in order.
//!
//! One producer thread prepares batch after batch; the images of a batch are spread over the pool, each written to its
//! own place. Finished batches wait in a bounded channel, so that no more than `prefetch` are ahead of the consumer.
//! Nothing in a batch depends on which thread did what: every random number is drawn from the stream of its image.

use super::transform::{SampleId, Scratch};
use super::{BadImages, Dataset, EvalTransform, Image, MixConfig, MixPlan, TrainTransform, draw};
use crate::random::{Purpose, Stream};
use crate::{Error, Result};
use crossbeam_channel::{Receiver, Sender, bounded};
use rayon::prelude::*;
use rayon::{ThreadPool, ThreadPoolBuilder};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

/// What is done with each image, and in which order they come.
#[derive(Clone, Debug, PartialEq)]
pub enum Pipeline {
    /// Shuffled and augmented. A last batch that would be short is dropped, unless it is the only one.
    Train(TrainTransform),
    /// In the order of the dataset, every image once, the last batch as short as it is.
    Eval(EvalTransform),
}

/// How to load.
#[derive(Clone, Debug, PartialEq)]
pub struct LoaderConfig {
    /// Images a batch.
    pub batch: usize,
    /// Width and height of every image, in pixels.
    pub size: usize,
    /// Seed of order and augmentation.
    pub seed: u64,
    /// Threads that decode and augment; 0 for one per processor.
    pub threads: usize,
    /// Finished batches that may wait; one more is being made. 0 makes a batch only while the one before is being used.
    pub prefetch: usize,
    /// What to do about an image that cannot be decoded.
    pub bad_images: BadImages,
    /// What is done with each image.
    pub pipeline: Pipeline,
}

/// `n` images with their labels.
#[derive(Clone, Debug, PartialEq)]
pub struct Batch {
    /// `[n, size, size, 3]`, 8-bit RGB. Not yet mixed.
    pub images: Vec<u8>,
    /// Width and height in pixels.
    pub size: usize,
    /// Which images of the dataset these are.
    pub indices: Vec<u32>,
    /// Their classes.
    pub labels: Vec<u32>,
    /// The epoch they were prepared for.
    pub epoch: u32,
    /// How the images and labels are to be mixed.
    pub mix: MixPlan,
}

impl Batch {
    /// How many images.
    pub fn len(&self) -> usize {
        self.indices.len()
    }

    /// Whether there are none; a loader delivers no such batch.
    pub fn is_empty(&self) -> bool {
        self.indices.is_empty()
    }
}

/// Turns a dataset into batches.
pub struct Loader(Arc<Shared>);

struct Shared {
    dataset: Arc<dyn Dataset>,
    config: LoaderConfig,
    pool: ThreadPool,
}

impl std::fmt::Debug for Loader {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Shared { dataset, config, .. } = &*self.0;
        f.debug_struct("Loader").field("dataset", &dataset.name()).field("config", config).finish()
    }
}

impl Loader {
    /// Checks the configuration and starts the threads.
    ///
    /// # Errors
    /// [`Error::Usage`] naming the field that cannot work, or the dataset if it is empty.
    pub fn new(dataset: Arc<dyn Dataset>, config: LoaderConfig) -> Result<Self> {
        if config.batch == 0 {
            return Err(Error::usage("batch", 0, "expected at least 1"));
        }
        if !(1..=1 << 14).contains(&config.size) {
            return Err(Error::usage("size", config.size, "expected 1 to 16384 pixels"));
        }
        if dataset.is_empty() || dataset.len() > u32::MAX as usize {
            let problem = format!("{} images; expected 1 to {}", dataset.len(), u32::MAX);
            return Err(Error::usage("data", dataset.name(), problem));
        }
        match &config.pipeline {
            Pipeline::Train(transform) => transform.validate()?,
            Pipeline::Eval(transform) => transform.validate()?,
        }
        let pool = ThreadPoolBuilder::new()
            .num_threads(config.threads)
            .thread_name(|number| format!("loader-{number}"))
            .build()
            .map_err(|error| Error::usage("threads", config.threads, format!("{error}; ask for fewer")))?;
        Ok(Self(Arc::new(Shared { dataset, config, pool })))
    }

    /// What is loaded from.
    pub fn dataset(&self) -> &Arc<dyn Dataset> {
        &self.0.dataset
    }

    /// Batches an epoch.
    pub fn batches(&self) -> usize {
        self.0.batches()
    }

    /// The batches of one epoch from number `start_batch` on: exactly those that an unbroken epoch would go on with.
    /// Preparing begins at once. After an error the iterator ends.
    pub fn epoch(&self, epoch: u32, start_batch: usize) -> Epoch {
        let (sender, receiver) = bounded(self.0.config.prefetch);
        let stop = Arc::new(AtomicBool::new(false));
        let remaining = self.batches().saturating_sub(start_batch);
        let producer = std::thread::Builder::new().name("loader".to_owned()).spawn({
            let (shared, stop) = (Arc::clone(&self.0), Arc::clone(&stop));
            move || shared.produce(epoch, start_batch, &sender, &stop)
        });
        Epoch { receiver: Some(receiver), producer: Some(producer), stop, remaining }
    }
}

impl Shared {
    fn batches(&self) -> usize {
        let (images, batch) = (self.dataset.len(), self.config.batch);
        match self.config.pipeline {
            Pipeline::Train(_) => (images / batch).max(1),
            Pipeline::Eval(_) => images.div_ceil(batch),
        }
    }

    fn order(&self, epoch: u32) -> Vec<u32> {
        let mut order: Vec<u32> = (0..self.dataset.len() as u32).collect();
        if let Pipeline::Train(_) = self.config.pipeline {
            draw::shuffle(&mut Stream::new(self.config.seed, epoch, 0, Purpose::Shuffle), &mut order);
        }
        order
    }

    fn produce(&self, epoch: u32, start: usize, sender: &Sender<Result<Batch>>, stop: &AtomicBool) {
        let order = self.order(epoch);
        for indices in order.chunks(self.config.batch).take(self.batches()).skip(start) {
            let batch = self.pool.install(|| self.load(indices, epoch, stop));
            let failed = batch.is_err();
            if stop.load(Ordering::Relaxed) || sender.send(batch).is_err() || failed {
                return;
            }
        }
    }

    fn load(&self, wanted: &[u32], epoch: u32, stop: &AtomicBool) -> Result<Batch> {
        let LoaderConfig { size, seed, .. } = self.config;
        let mut images = vec![0; wanted.len() * size * size * 3];
        // Results are collected in order, so that the first error is the same on any number of threads.
        let results: Vec<Result<u32>> = images
            .par_chunks_exact_mut(size * size * 3)
            .zip(wanted)
            .map_init(Scratch::default, |scratch, (out, &index)| {
                if stop.load(Ordering::Relaxed) {
                    return Ok(index);
                }
                let (image, index) = self.decodable(index)?;
                let sample = SampleId { seed, epoch, image: index };
                match &self.config.pipeline {
                    Pipeline::Train(transform) => transform.apply(&image, size, sample, scratch, out)?,
                    Pipeline::Eval(transform) => transform.apply(&image, size, scratch, out)?,
                }
                Ok(index)
            })
            .collect();
        let indices: Vec<u32> = results.into_iter().collect::<Result<_>>()?;
        let labels = indices.iter().map(|&index| self.dataset.label(index as usize)).collect();
        let mix = match &self.config.pipeline {
            Pipeline::Train(transform) => transform.mix,
            Pipeline::Eval(_) => MixConfig::default(),
        };
        let mix = MixPlan::draw(mix, seed, epoch, &indices, size)?;
        Ok(Batch { images, size, indices, labels, epoch, mix })
    }

    /// Image `wanted`, or the next one that can be decoded, and which one that is.
    fn decodable(&self, wanted: u32) -> Result<(Image, u32)> {
        let images = self.dataset.len() as u32;
        for index in (wanted..images).chain(0..wanted) {
            match self.dataset.image(index as usize) {
                Ok(image) => return Ok((image, index)),
                Err(Error::File { path, problem }) if self.config.bad_images == BadImages::Skip => {
                    self.dataset.problems().record(&path, problem);
                }
                Err(error) => return Err(error),
            }
        }
        Err(Error::Training(format!(
            "{}: none of the {images} images can be decoded; the list of problems says why",
            self.dataset.name()
        )))
    }
}

/// The batches of one epoch, in order. Dropping it stops the preparation and waits for the image in hand.
pub struct Epoch {
    receiver: Option<Receiver<Result<Batch>>>,
    producer: Option<std::io::Result<JoinHandle<()>>>,
    stop: Arc<AtomicBool>,
    remaining: usize,
}

impl std::fmt::Debug for Epoch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Epoch").field("remaining", &self.remaining).finish()
    }
}

impl Epoch {
    /// Why the producer ended before it delivered everything.
    fn cause(&mut self) -> Error {
        let cause = match self.producer.take() {
            Some(Err(error)) => format!("cannot start a thread ({error}); ask for fewer threads"),
            Some(Ok(handle)) => match handle.join() {
                Err(panic) => panic_message(&*panic),
                Ok(()) => "ended early".to_owned(),
            },
            None => "ended early".to_owned(),
        };
        Error::Training(format!("the loader failed: {cause}"))
    }
}

fn panic_message(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
    let text = text.or_else(|| panic.downcast_ref::<String>().cloned());
    text.unwrap_or_else(|| "a thread panicked".to_owned())
}

impl Iterator for Epoch {
    type Item = Result<Batch>;

    fn next(&mut self) -> Option<Result<Batch>> {
        if self.remaining == 0 {
            return None;
        }
        let received = self.receiver.as_ref().and_then(|receiver| receiver.recv().ok());
        let item = received.unwrap_or_else(|| Err(self.cause()));
        self.remaining = if item.is_ok() { self.remaining - 1 } else { 0 };
        Some(item)
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        (self.remaining.min(1), Some(self.remaining))
    }
}

impl Drop for Epoch {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        // A producer that waits for room in the channel must hear that nobody listens any more.
        drop(self.receiver.take());
        if let Some(Ok(handle)) = self.producer.take() {
            // A panic there was either reported by `next` or concerns batches that nobody asked for.
            let _ = handle.join();
        }
    }
}
