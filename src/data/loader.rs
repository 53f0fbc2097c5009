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

/// The largest width and height of prepared images, in pixels.
pub const LARGEST_SIDE: usize = 1 << 14;

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
        if !(1..=LARGEST_SIDE).contains(&config.size) {
            return Err(Error::usage("size", config.size, format!("expected 1 to {LARGEST_SIDE} pixels")));
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::Problems;
    use proptest::prelude::*;
    use std::path::Path;
    use std::sync::atomic::AtomicUsize;
    use std::time::Duration;

    /// Image i is a 4×4 square of value i and has label i mod 3. Some images are bad in some way.
    #[derive(Default)]
    struct Plain {
        len: usize,
        undecodable: Vec<usize>,
        unreadable: Vec<usize>,
        panicking: Vec<usize>,
        delay: Duration,
        decoded: AtomicUsize,
        problems: Problems,
    }

    impl Dataset for Plain {
        fn name(&self) -> &str {
            "plain"
        }
        fn len(&self) -> usize {
            self.len
        }
        fn classes(&self) -> &[String] {
            &[]
        }
        fn label(&self, index: usize) -> u32 {
            index as u32 % 3
        }
        fn image(&self, index: usize) -> Result<Image> {
            self.decoded.fetch_add(1, Ordering::Relaxed);
            std::thread::sleep(self.delay);
            let path = format!("{index}.png");
            if self.undecodable.contains(&index) {
                return Err(Error::file(Path::new(&path), "damaged"));
            }
            if self.unreadable.contains(&index) {
                return Err(Error::io(Path::new(&path), "read")(std::io::ErrorKind::PermissionDenied.into()));
            }
            assert!(!self.panicking.contains(&index), "image {index} breaks the decoder");
            Ok(Image::from_grey(4, 4, (0..16).map(|at| (index * 16 + at) as u8)))
        }
        fn problems(&self) -> &Problems {
            &self.problems
        }
    }

    fn eval() -> Pipeline {
        Pipeline::Eval(EvalTransform::default())
    }

    fn train() -> Pipeline {
        let mix = MixConfig { mixup: 0.2, cutmix: 1.0 };
        Pipeline::Train(TrainTransform { mix, ..TrainTransform::default() })
    }

    fn config(batch: usize, pipeline: Pipeline) -> LoaderConfig {
        LoaderConfig {
            batch,
            size: 6,
            seed: 1,
            threads: 2,
            prefetch: 2,
            bad_images: BadImages::Skip,
            pipeline,
        }
    }

    fn loader(dataset: Plain, config: LoaderConfig) -> Loader {
        Loader::new(Arc::new(dataset), config).unwrap()
    }

    fn plain(len: usize) -> Plain {
        Plain { len, ..Plain::default() }
    }

    fn all(loader: &Loader, epoch: u32, start: usize) -> Vec<Batch> {
        loader.epoch(epoch, start).collect::<Result<_>>().unwrap()
    }

    fn indices(batches: &[Batch]) -> Vec<u32> {
        batches.iter().flat_map(|batch| batch.indices.clone()).collect()
    }

    #[test]
    fn evaluation_delivers_every_image_once_in_order() {
        let loader = loader(plain(7), LoaderConfig { size: 4, ..config(3, eval()) });
        let batches = all(&loader, 0, 0);
        assert_eq!(batches.iter().map(Batch::len).collect::<Vec<_>>(), [3, 3, 1]);
        assert_eq!((batches.len(), indices(&batches)), (loader.batches(), (0..7).collect()));
        let last = &batches[2];
        assert_eq!(last.labels, [0]);
        let expected: Vec<u8> = (96..112).flat_map(|value| [value; 3]).collect();
        assert_eq!((&last.images, last.size, last.epoch), (&expected, 4, 0));
        assert_eq!(last.mix, MixPlan::none(1));
        assert_eq!(all(&loader, 5, 0)[0].images, batches[0].images);
    }

    #[test]
    fn training_shuffles_each_epoch_differently_and_drops_the_short_batch() {
        let loader = loader(plain(50), config(8, train()));
        let first = all(&loader, 0, 0);
        assert!(first.len() == 6 && loader.batches() == 6 && first.iter().all(|batch| batch.len() == 8));
        let mut order = indices(&first);
        assert_ne!(order, indices(&all(&loader, 1, 0)));
        assert!(
            first.iter().all(|b| b.indices.iter().zip(&b.labels).all(|(&index, &label)| label == index % 3))
        );
        order.sort_unstable();
        order.dedup();
        assert_eq!(order.len(), 48, "an image came twice");
        let other = Loader::new(Arc::new(plain(50)), LoaderConfig { seed: 2, ..config(8, train()) }).unwrap();
        assert_ne!(indices(&first), indices(&all(&other, 0, 0)));
    }

    #[test]
    fn the_only_batch_may_be_short() {
        let batches = all(&loader(plain(5), config(8, train())), 0, 0);
        assert_eq!((batches.len(), batches[0].len()), (1, 5));
    }

    #[test]
    fn the_mix_belongs_to_the_delivered_images() {
        let batch = all(&loader(plain(9), config(8, train())), 3, 0).remove(0);
        let expected = MixPlan::draw(MixConfig { mixup: 0.2, cutmix: 1.0 }, 1, 3, &batch.indices, 6).unwrap();
        assert_eq!(batch.mix, expected);
        assert!(!batch.mix.is_none());
    }

    #[test]
    fn an_undecodable_image_is_replaced_by_the_next_and_named_once() {
        let dataset = Arc::new(Plain { undecodable: vec![2, 3, 6], ..plain(7) });
        let loader = Loader::new(dataset.clone(), config(4, eval())).unwrap();
        for _ in 0..2 {
            let batches = all(&loader, 0, 0);
            assert_eq!(indices(&batches), [0, 1, 4, 4, 4, 5, 0]);
            assert_eq!(batches[0].labels, [0, 1, 1, 1]);
        }
        let names: Vec<String> =
            dataset.problems().list().iter().map(|problem| problem.path.display().to_string()).collect();
        assert_eq!(names, ["2.png", "3.png", "6.png"]);
    }

    fn last_error(mut epoch: Epoch) -> String {
        let error = epoch.find_map(Result::err).expect("an error").to_string();
        assert!(epoch.next().is_none(), "the iterator went on after an error");
        error
    }

    #[test]
    fn errors_arrive_and_end_the_epoch() {
        let strict = LoaderConfig { bad_images: BadImages::Fail, ..config(2, eval()) };
        let bad = || Plain { undecodable: vec![4, 5], ..plain(9) };
        assert_eq!(last_error(loader(bad(), strict).epoch(0, 0)), "4.png: damaged");
        // Trouble with reading is no property of the image.
        let unreadable = Plain { unreadable: vec![3], ..plain(9) };
        assert!(
            last_error(loader(unreadable, config(2, eval())).epoch(0, 0)).starts_with("3.png: cannot read")
        );
        let hopeless = Plain { undecodable: vec![0, 1, 2], ..plain(3) };
        assert!(last_error(loader(hopeless, config(2, eval())).epoch(0, 0)).contains("none of the 3 images"));
        let panicking = Plain { panicking: vec![4], ..plain(9) };
        assert!(
            last_error(loader(panicking, config(2, eval())).epoch(0, 0))
                .contains("image 4 breaks the decoder")
        );
    }

    #[test]
    fn no_more_is_prepared_than_asked_for() {
        let dataset = Arc::new(plain(1000));
        let loader =
            Loader::new(dataset.clone(), LoaderConfig { prefetch: 3, ..config(10, eval()) }).unwrap();
        let mut epoch = loader.epoch(0, 0);
        epoch.next().unwrap().unwrap();
        std::thread::sleep(Duration::from_millis(100));
        // One delivered, three waiting, one made and held until there is room.
        assert_eq!(dataset.decoded.load(Ordering::Relaxed), 50);
    }

    #[test]
    fn an_epoch_dropped_early_stops_and_lets_go() {
        for prefetch in 0..3 {
            for taken in 0..3 {
                let dataset = Arc::new(plain(10_000));
                let loader =
                    Loader::new(dataset.clone(), LoaderConfig { prefetch, ..config(4, train()) }).unwrap();
                let mut epoch = loader.epoch(0, 0);
                for _ in 0..taken {
                    epoch.next().unwrap().unwrap();
                }
                drop(epoch);
                drop(loader);
                assert!(dataset.decoded.load(Ordering::Relaxed) <= 4 * (taken + prefetch + 1));
                assert_eq!(Arc::strong_count(&dataset), 1, "a thread still holds the dataset");
            }
        }
    }

    /// A batch of slow images is given up in the middle.
    #[test]
    fn dropping_waits_for_no_more_than_the_image_in_hand() {
        let dataset = Arc::new(Plain { delay: Duration::from_millis(1), ..plain(500) });
        let loader = Loader::new(dataset.clone(), config(500, eval())).unwrap();
        drop(loader.epoch(0, 0));
        assert!(dataset.decoded.load(Ordering::Relaxed) < 100);
    }

    #[test]
    fn impossible_configurations_are_refused() {
        let refuse = |dataset: Plain, config: LoaderConfig| {
            Loader::new(Arc::new(dataset), config).unwrap_err().to_string()
        };
        assert!(refuse(plain(3), config(0, eval())).starts_with("batch = 0"));
        assert!(refuse(plain(3), LoaderConfig { size: 0, ..config(1, eval()) }).starts_with("size = 0"));
        assert!(refuse(plain(0), config(1, eval())).starts_with("data = plain: 0 images"));
        let flip = TrainTransform { flip: 2.0, ..TrainTransform::default() };
        assert!(refuse(plain(3), config(1, Pipeline::Train(flip))).starts_with("flip = 2"));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]

        /// Neither threads nor prefetching nor an interruption changes a bit.
        #[test]
        fn threads_and_interruptions_change_nothing(
            len in 1usize..40, batch in 1usize..12, epoch in 0u32..5, seed: u64, threads in 1usize..5,
            prefetch in 0usize..4, start in 0usize..50, training: bool
        ) {
            let pipeline = if training { train() } else { eval() };
            let base = LoaderConfig { seed, threads: 1, prefetch: 0, ..config(batch, pipeline) };
            let unbroken = all(&loader(plain(len), base.clone()), epoch, 0);
            let other = loader(plain(len), LoaderConfig { threads, prefetch, ..base });
            prop_assert_eq!(unbroken.len(), other.batches());
            prop_assert_eq!(&all(&other, epoch, 0), &unbroken);
            let start = start % (unbroken.len() + 2);
            prop_assert_eq!(&all(&other, epoch, start)[..], &unbroken[start.min(unbroken.len())..]);
        }
    }
}
