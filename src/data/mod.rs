//! From files to batches.
//!
//! A [`Dataset`] knows how many images there are, their labels, and how to decode one. A [`Loader`] turns it into
//! batches: an order per epoch, decoding and augmentation on several threads, everything delivered in order. Images
//! travel as `u8` RGB, height × width × 3; the normalisation to floats and the mixing of images belong to the backend,
//! which gets the [`MixPlan`] with each batch.
//!
//! Whatever is random is drawn from a [`Stream`](crate::random::Stream) of (seed, epoch, image, purpose). So a batch
//! is a pure function of the configuration, the epoch and its number: the count of threads cannot change it, and
//! training resumed in the middle of an epoch sees exactly what it would have seen.

#![forbid(unsafe_code)]

mod decode;
pub mod digits;
mod draw;
pub mod folder;
pub mod idx;
pub mod loader;
pub mod mix;
pub mod pixel_ops;
mod problems;
pub mod randaugment;
pub mod transform;

use crate::{Error, Result};
pub use decode::read as read_image;
pub use loader::{Batch, Loader, LoaderConfig, Pipeline};
pub use mix::{MixConfig, MixPlan, PatchBox};
pub use problems::{BadImages, Problem, Problems};
pub use randaugment::{Operation, RandAugment};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::Arc;
pub use transform::{EvalTransform, TrainTransform};

/// Images with labels, by index. Cheap to ask, expensive only in [`Dataset::image`], which many threads call at once.
pub trait Dataset: Send + Sync {
    /// A name for reports, such as `digits` or the folder's name.
    fn name(&self) -> &str;

    /// How many images there are.
    fn len(&self) -> usize;

    /// Whether there are none. The datasets of this module never are.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The names of the classes; a label is an index into them.
    fn classes(&self) -> &[String];

    /// The class of image `index`.
    ///
    /// # Panics
    /// If `index` is not below [`len`](Dataset::len).
    fn label(&self, index: usize) -> u32;

    /// Decodes image `index`.
    ///
    /// # Errors
    /// [`Error::File`] if the content cannot be decoded (the loader may put another image in its place), any other
    /// error if reading itself failed.
    ///
    /// # Panics
    /// If `index` is not below [`len`](Dataset::len).
    fn image(&self, index: usize) -> Result<Image>;

    /// What turned out to be unusable so far, when opening and while loading.
    fn problems(&self) -> &Problems;
}

/// A decoded image: 8-bit RGB, `height` × `width` × 3, row by row, channels innermost.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Image {
    /// Width in pixels, at least 1.
    pub width: usize,
    /// Height in pixels, at least 1.
    pub height: usize,
    /// `height * width * 3` bytes.
    pub pixels: Vec<u8>,
}

impl Image {
    /// An RGB image from `height * width` grey values.
    pub(crate) fn from_grey(width: usize, height: usize, grey: impl IntoIterator<Item = u8>) -> Self {
        let pixels: Vec<u8> = grey.into_iter().flat_map(|value| [value; 3]).collect();
        debug_assert_eq!(pixels.len(), width * height * 3);
        Self { width, height, pixels }
    }
}

/// The two parts of a data set. Both have the same classes.
#[derive(Clone)]
pub struct Splits {
    /// What is trained on.
    pub train: Arc<dyn Dataset>,
    /// What accuracy is measured on; never trained on.
    pub validation: Arc<dyn Dataset>,
}

impl Splits {
    /// What turned out to be unusable so far in either part.
    pub fn problems(&self) -> Vec<Problem> {
        [&self.train, &self.validation].iter().flat_map(|part| part.problems().list()).collect()
    }
}

impl std::fmt::Debug for Splits {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Splits")
            .field("name", &self.train.name())
            .field("train", &self.train.len())
            .field("validation", &self.validation.len())
            .finish()
    }
}

/// Where images come from.
#[non_exhaustive]
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// The handwritten digits inside the program ([`digits`]).
    Digits,
    /// A folder of IDX files ([`idx`]) or an image folder ([`folder`]).
    Folder(PathBuf),
}

impl Source {
    /// Understands `digits` or the path of a folder (a folder of that very name is `./digits`).
    ///
    /// # Errors
    /// [`Error::Usage`] if `text` is empty. Whether the folder exists is found out by [`open`].
    pub fn parse(text: &str) -> Result<Self> {
        match text {
            "" => Err(Error::usage("data", "\"\"", format!("expected `digits` or {EXPECTED}"))),
            "digits" => Ok(Self::Digits),
            path => Ok(Self::Folder(path.into())),
        }
    }
}

const EXPECTED: &str = "a folder with either `train/<class>/*` and `val/<class>/*` images (JPEG, PNG) \
    or the MNIST files `train-images-idx3-ubyte[.gz]`, `train-labels-idx1-ubyte[.gz]`, `t10k-images-idx3-ubyte[.gz]`, \
    `t10k-labels-idx1-ubyte[.gz]`";

/// Opens a data set. `bad_images` says what to do about images that are not: skip and report them, or fail.
///
/// # Errors
/// [`Error::File`] or [`Error::Io`], naming the file or folder at fault and what was expected.
pub fn open(source: &Source, bad_images: BadImages) -> Result<Splits> {
    match source {
        Source::Digits => Ok(digits::open()),
        Source::Folder(root) => open_folder(root, bad_images),
    }
}

fn open_folder(root: &Path, bad_images: BadImages) -> Result<Splits> {
    let metadata = std::fs::metadata(root).map_err(|error| match error.kind() {
        ErrorKind::NotFound => {
            Error::file(root, format!("there is no such folder; expected `digits` or {EXPECTED}"))
        }
        _ => Error::io(root, "open")(error),
    })?;
    if !metadata.is_dir() {
        return Err(Error::file(root, format!("this is a file; expected {EXPECTED}")));
    }
    if idx::is_idx(root) {
        idx::open(root)
    } else if folder::is_image_folder(root) {
        folder::open(root, bad_images)
    } else {
        Err(Error::file(root, format!("no data set found here; expected {EXPECTED}")))
    }
}

/// The last part of a path, for reports.
fn folder_name(root: &Path) -> String {
    root.file_name().unwrap_or(root.as_os_str()).to_string_lossy().into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sources_are_parsed() {
        assert_eq!(Source::parse("digits").unwrap(), Source::Digits);
        assert_eq!(Source::parse("./digits").unwrap(), Source::Folder("./digits".into()));
        assert!(Source::parse("").unwrap_err().to_string().contains("digits"));
    }
}
