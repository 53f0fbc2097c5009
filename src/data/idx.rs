//! IDX files, as MNIST and Fashion-MNIST are distributed, gzipped or not.
//!
//! The format: four bytes of magic (two zeros, the type code 0x08 for bytes, the number of dimensions), the dimensions
//! as big-endian 32-bit numbers, then the bytes. Reading is strict: a file that is not exactly that is named, with what
//! was found in it.

use super::{Dataset, Image, Problems, Splits, folder_name};
use crate::{Error, Result};
use flate2::read::MultiGzDecoder;
use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Kind of content, magic number and number of dimensions of the two files of a part.
const IMAGES: (&str, [u8; 4], usize) = ("images", [0, 0, 8, 3], 3);
const LABELS: (&str, [u8; 4], usize) = ("labels", [0, 0, 8, 1], 1);
const GZIP: [u8; 2] = [0x1f, 0x8b];

/// One part of an IDX data set, held in memory. Grey becomes RGB when an image is asked for.
pub struct Idx {
    name: String,
    classes: Vec<String>,
    width: usize,
    height: usize,
    grey: Vec<u8>,
    labels: Vec<u8>,
    problems: Problems,
}

impl std::fmt::Debug for Idx {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { name, width, height, .. } = self;
        write!(f, "Idx({name}, {} images of {width}x{height})", self.labels.len())
    }
}

/// Whether `root` holds at least one of the four files.
pub fn is_idx(root: &Path) -> bool {
    ["train", "t10k"].iter().any(|part| find(root, part, IMAGES).or(find(root, part, LABELS)).is_some())
}

/// Opens the training part (`train-*`) and the validation part (`t10k-*`) in `root`. The files may carry the ending
/// `.gz` or not, and `images.idx3` in place of `images-idx3`. The classes are the labels 0 to the largest one.
///
/// # Errors
/// [`Error::Io`] for a file that cannot be read; [`Error::File`] for one that is missing, is not IDX, is cut short or
/// too long, or whose count of labels differs from the count of images.
pub fn open(root: &Path) -> Result<Splits> {
    let (train, train_labels) = open_part(root, "train")?;
    let (validation, validation_labels) = open_part(root, "t10k")?;
    let largest = train.labels.iter().max().copied().unwrap_or(0);
    if let Some(unknown) = validation.labels.iter().find(|&&label| label > largest) {
        return Err(Error::file(
            &validation_labels,
            format!(
                "label {unknown} appears here but the labels of {} end at {largest}; the two files do not belong together",
                train_labels.display()
            ),
        ));
    }
    let classes: Vec<String> = (0..=largest).map(|label| label.to_string()).collect();
    Ok(Splits {
        train: Arc::new(Idx { classes: classes.clone(), ..train }),
        validation: Arc::new(Idx { classes, ..validation }),
    })
}

fn open_part(root: &Path, part: &str) -> Result<(Idx, PathBuf)> {
    let locate = |kind: (&str, [u8; 4], usize)| {
        find(root, part, kind).ok_or_else(|| {
            let missing = format!("`{part}-{}-idx{}-ubyte` (or .gz) is missing; put it here", kind.0, kind.2);
            Error::file(root, missing)
        })
    };
    let (images_path, labels_path) = (locate(IMAGES)?, locate(LABELS)?);
    let (dims, grey) = read(&images_path, IMAGES)?;
    let (_, labels) = read(&labels_path, LABELS)?;
    if labels.len() != dims[0] {
        let problem = format!(
            "{} labels for the {} images of {}; the two files do not belong together: fetch both again",
            labels.len(),
            dims[0],
            images_path.display()
        );
        return Err(Error::file(&labels_path, problem));
    }
    let [height, width] = [dims[1], dims[2]];
    let problems = Problems::default();
    let part = Idx { name: folder_name(root), classes: Vec::new(), width, height, grey, labels, problems };
    Ok((part, labels_path))
}

fn find(root: &Path, part: &str, (kind, _, rank): (&str, [u8; 4], usize)) -> Option<PathBuf> {
    ["-", "."]
        .iter()
        .flat_map(|dot| ["", ".gz"].map(|gz| root.join(format!("{part}-{kind}{dot}idx{rank}-ubyte{gz}"))))
        .find(|path| path.is_file())
}

/// The dimensions and the bytes of one file. Gzip is recognised by content, whatever the name ends in.
fn read(path: &Path, (kind, magic, rank): (&str, [u8; 4], usize)) -> Result<(Vec<usize>, Vec<u8>)> {
    let mut file = BufReader::new(File::open(path).map_err(Error::io(path, "open"))?);
    let zipped = file.fill_buf().map_err(Error::io(path, "read"))?.starts_with(&GZIP);
    let mut input: Box<dyn Read> = if zipped { Box::new(MultiGzDecoder::new(file)) } else { Box::new(file) };

    let mut header = Vec::new();
    read_up_to(&mut input, 4 + 4 * rank as u64, &mut header, path)?;
    if !header.starts_with(&magic) {
        let found = &header[..header.len().min(4)];
        let problem = format!(
            "not an IDX file of {kind}: it begins with {found:02x?} instead of {magic:02x?}; fetch it again"
        );
        return Err(Error::file(path, problem));
    }
    if header.len() < 4 + 4 * rank {
        return Err(cut_short(path, "the header ends early"));
    }
    let dims: Vec<usize> = header[4..]
        .chunks_exact(4)
        .map(|bytes| bytes.iter().fold(0, |value, &byte| value << 8 | usize::from(byte)))
        .collect();
    let expected = dims.iter().try_fold(1u64, |product, &dim| product.checked_mul(dim as u64));
    let Some(expected @ 1..) = expected else {
        let problem = format!("dimensions {dims:?} do not describe any {kind}; fetch it again");
        return Err(Error::file(path, problem));
    };
    let mut bytes = Vec::new();
    // One byte more than announced, to notice a file that goes on.
    read_up_to(&mut input, expected.saturating_add(1), &mut bytes, path)?;
    match bytes.len() as u64 {
        found if found < expected => {
            Err(cut_short(path, &format!("{found} of the {expected} bytes that dimensions {dims:?} need")))
        }
        found if found > expected => {
            let problem =
                format!("bytes follow the {expected} that dimensions {dims:?} need; fetch it again");
            Err(Error::file(path, problem))
        }
        _ => Ok((dims, bytes)),
    }
}

fn read_up_to(input: &mut dyn Read, limit: u64, bytes: &mut Vec<u8>, path: &Path) -> Result<()> {
    match input.take(limit).read_to_end(bytes) {
        Ok(_) => Ok(()),
        Err(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => {
            Err(cut_short(path, "the gzip stream ends early"))
        }
        Err(error) => Err(Error::io(path, "read")(error)),
    }
}

fn cut_short(path: &Path, what: &str) -> Error {
    Error::file(path, format!("the file is cut short ({what}); fetch it again"))
}

impl Dataset for Idx {
    fn name(&self) -> &str {
        &self.name
    }

    fn len(&self) -> usize {
        self.labels.len()
    }

    fn classes(&self) -> &[String] {
        &self.classes
    }

    fn label(&self, index: usize) -> u32 {
        u32::from(self.labels[index])
    }

    fn image(&self, index: usize) -> Result<Image> {
        let area = self.width * self.height;
        let grey = &self.grey[index * area..(index + 1) * area];
        Ok(Image::from_grey(self.width, self.height, grey.iter().copied()))
    }

    fn problems(&self) -> &Problems {
        &self.problems
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use flate2::{Compression, write::GzEncoder};
    use std::io::Write;

    /// Magic, dimensions, bytes.
    fn idx(dims: &[u32], bytes: &[u8]) -> Vec<u8> {
        let mut file = vec![0, 0, 8, dims.len() as u8];
        file.extend(dims.iter().flat_map(|dim| dim.to_be_bytes()));
        file.extend_from_slice(bytes);
        file
    }

    fn gzip(bytes: &[u8]) -> Vec<u8> {
        let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
        encoder.write_all(bytes).unwrap();
        encoder.finish().unwrap()
    }

    /// Three training and two validation images of 2 rows and 3 columns.
    fn write_all(root: &Path) {
        let write = |name: &str, bytes: &[u8]| std::fs::write(root.join(name), bytes).unwrap();
        write("train-images-idx3-ubyte", &idx(&[3, 2, 3], &(0..18).collect::<Vec<u8>>()));
        write("train-labels-idx1-ubyte", &idx(&[3], &[1, 0, 2]));
        write("t10k-images-idx3-ubyte.gz", &gzip(&idx(&[2, 2, 3], &[7; 12])));
        write("t10k-labels.idx1-ubyte.gz", &gzip(&idx(&[2], &[2, 1])));
    }

    #[test]
    fn plain_and_gzipped_files_are_read() {
        let folder = tempfile::tempdir().unwrap();
        write_all(folder.path());
        assert!(is_idx(folder.path()));
        let Splits { train, validation } = open(folder.path()).unwrap();
        assert_eq!((train.len(), validation.len()), (3, 2));
        assert_eq!(train.classes(), ["0", "1", "2"]);
        assert_eq!(validation.classes(), train.classes());
        assert_eq!((0..3).map(|i| train.label(i)).collect::<Vec<_>>(), [1, 0, 2]);
        let image = train.image(1).unwrap();
        assert_eq!((image.width, image.height), (3, 2));
        assert_eq!(image.pixels, [6, 6, 6, 7, 7, 7, 8, 8, 8, 9, 9, 9, 10, 10, 10, 11, 11, 11]);
    }

    /// Every way to be wrong is an error that names the file and says what was found.
    #[test]
    fn damaged_files_are_named() {
        let whole = gzip(&idx(&[2, 2, 3], &[7; 12]));
        let cases: [(&str, Option<Vec<u8>>, &str); 12] = [
            ("train-images-idx3-ubyte", Some(idx(&[3], &[0; 3])), "begins with [00, 00, 08, 01]"),
            ("train-images-idx3-ubyte", Some(b"<htm".to_vec()), "begins with [3c, 68, 74, 6d]"),
            ("train-images-idx3-ubyte", Some(Vec::new()), "begins with []"),
            ("train-images-idx3-ubyte", Some(idx(&[3, 2, 3], &[0; 17])), "17 of the 18 bytes"),
            ("train-images-idx3-ubyte", Some(idx(&[3, 2, 3], &[0; 19])), "bytes follow the 18"),
            ("train-images-idx3-ubyte", Some(idx(&[3, 0, 3], &[])), "[3, 0, 3]"),
            ("train-images-idx3-ubyte", Some(idx(&[u32::MAX; 3], &[])), "do not describe"),
            ("train-images-idx3-ubyte", Some(vec![0, 0, 8, 3, 0, 0]), "header ends early"),
            ("train-labels-idx1-ubyte", Some(idx(&[2], &[0, 1])), "2 labels for the 3 images"),
            ("train-labels-idx1-ubyte", None, "`train-labels-idx1-ubyte` (or .gz) is missing"),
            ("t10k-labels.idx1-ubyte.gz", Some(idx(&[2], &[2, 3])), "label 3 appears here"),
            ("t10k-images-idx3-ubyte.gz", Some(whole[..whole.len() / 2].to_vec()), "gzip stream ends early"),
        ];
        for (name, content, message) in cases {
            let folder = tempfile::tempdir().unwrap();
            write_all(folder.path());
            let path = folder.path().join(name);
            match &content {
                Some(bytes) => std::fs::write(&path, bytes).unwrap(),
                None => std::fs::remove_file(&path).unwrap(),
            }
            let error = open(folder.path()).unwrap_err().to_string();
            assert!(error.contains(message) && error.contains(name), "{name}: {error}");
        }
    }
}
