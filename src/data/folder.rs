//! An image folder: `train/<class>/*` and `val/<class>/*`, JPEG or PNG.
//!
//! Classes and files are sorted by name, so an index means the same image on every machine. When the folder is opened
//! the header of every image is read (not the image): what is not an image is left out there and then, so that the
//! number of images, hence the length of an epoch, is known and true. An image that turns out to be damaged further
//! down is found when it is decoded; then the loader puts the next one in its place.

use super::{BadImages, Dataset, Image, Problems, Splits, decode, folder_name};
use crate::{Error, Result};
use rayon::prelude::*;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::Arc;

const TRAIN: &str = "train";
const VALIDATION: &str = "val";
const LAYOUT: &str = "images must lie in train/<class>/ and val/<class>/";
/// Endings of files meant to be images, decodable or not; other files are none of our business.
const IMAGE_ENDINGS: [&str; 18] = [
    "jpg", "jpeg", "jpe", "jfif", "png", "bmp", "gif", "webp", "tif", "tiff", "heic", "heif", "avif", "jp2",
    "jxl", "ppm", "pgm", "tga",
];

/// One part of an image folder.
#[derive(Debug)]
pub struct Folder {
    name: String,
    classes: Vec<String>,
    files: Vec<(PathBuf, u32)>,
    problems: Problems,
}

/// Whether `root` holds a `train` or a `val` folder.
pub fn is_image_folder(root: &Path) -> bool {
    [TRAIN, VALIDATION].iter().any(|part| root.join(part).is_dir())
}

/// Opens `root/train` and `root/val`. Files whose ending is not that of an image, hidden files and folders in
/// a class are ignored.
///
/// # Errors
/// [`Error::File`] if a part or class is missing or without images, if the two parts have different classes, and, with
/// [`BadImages::Fail`], for the first image whose header is unusable; [`Error::Io`] for whatever cannot be read.
pub fn open(root: &Path, bad_images: BadImages) -> Result<Splits> {
    let train = Folder::open(root, TRAIN, bad_images)?;
    let validation = Folder::open(root, VALIDATION, bad_images)?;
    for (here, there) in [(&train, &validation), (&validation, &train)] {
        if let Some(class) = here.classes.iter().find(|class| !there.classes.contains(class)) {
            let [here, there] =
                [here, there].map(|part| if std::ptr::eq(part, &train) { TRAIN } else { VALIDATION });
            let problem =
                format!("class `{class}` is in {here}/ but not in {there}/; both need the same classes");
            return Err(Error::file(root, problem));
        }
    }
    Ok(Splits { train: Arc::new(train), validation: Arc::new(validation) })
}

impl Folder {
    fn open(root: &Path, part: &str, bad_images: BadImages) -> Result<Self> {
        let folder = root.join(part);
        if !folder.is_dir() {
            return Err(Error::file(root, format!("there is no folder `{part}`; {LAYOUT}")));
        }
        let class_folders: Vec<PathBuf> = list(&folder)?.into_iter().filter(|path| path.is_dir()).collect();
        if class_folders.is_empty() {
            return Err(Error::file(&folder, format!("no class folders in here; {LAYOUT}")));
        }
        let problems = Problems::default();
        let mut files = Vec::new();
        for (label, class) in class_folders.iter().enumerate() {
            let candidates: Vec<PathBuf> =
                list(class)?.into_iter().filter(|path| is_image_name(path) && !path.is_dir()).collect();
            let usable = keep_usable(candidates, bad_images, &problems)?;
            if usable.is_empty() {
                return Err(Error::file(class, no_images(class, &problems)));
            }
            files.extend(usable.into_iter().map(|path| (path, label as u32)));
        }
        let classes = class_folders.iter().map(|path| folder_name(path)).collect();
        Ok(Self { name: folder_name(root), classes, files, problems })
    }
}

/// The files that can be opened and whose header is that of an image, in the same order; the others are recorded.
fn keep_usable(candidates: Vec<PathBuf>, bad_images: BadImages, problems: &Problems) -> Result<Vec<PathBuf>> {
    let checks: Vec<Result<()>> = candidates.par_iter().map(|path| decode::check_header(path)).collect();
    let mut usable = Vec::with_capacity(candidates.len());
    for (path, check) in candidates.into_iter().zip(checks) {
        match check {
            Ok(()) => usable.push(path),
            Err(Error::File { problem, .. }) if bad_images == BadImages::Skip => {
                problems.record(&path, problem);
            }
            Err(Error::Io { action, source, .. }) if bad_images == BadImages::Skip && is_its_own(&source) => {
                problems.record(&path, format!("cannot {action}: {source}"));
            }
            Err(error) => return Err(error),
        }
    }
    Ok(usable)
}

/// Whether the fault lies with this one file: a link that leads nowhere, a file that is not ours to read. A disk that fails
/// must not pass for many bad images.
fn is_its_own(error: &std::io::Error) -> bool {
    matches!(error.kind(), ErrorKind::NotFound | ErrorKind::PermissionDenied)
}

fn no_images(class: &Path, problems: &Problems) -> String {
    let bad = problems.list().into_iter().find(|problem| problem.path.starts_with(class));
    match bad {
        Some(bad) => format!(
            "none of the images of this class can be decoded ({}: {}); replace them or remove the class",
            folder_name(&bad.path),
            bad.reason
        ),
        None => format!("a class without images; add some or remove the folder ({LAYOUT}, not deeper)"),
    }
}

/// What is in a folder, without hidden files, sorted by name.
fn list(folder: &Path) -> Result<Vec<PathBuf>> {
    let mut paths = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(Error::io(folder, "list"))? {
        let entry = entry.map_err(Error::io(folder, "list"))?;
        if !entry.file_name().to_string_lossy().starts_with('.') {
            paths.push(entry.path());
        }
    }
    paths.sort_unstable();
    Ok(paths)
}

fn is_image_name(path: &Path) -> bool {
    let ending = path.extension().unwrap_or_default().to_string_lossy().to_ascii_lowercase();
    IMAGE_ENDINGS.contains(&ending.as_str())
}

impl Dataset for Folder {
    fn name(&self) -> &str {
        &self.name
    }

    fn len(&self) -> usize {
        self.files.len()
    }

    fn classes(&self) -> &[String] {
        &self.classes
    }

    fn label(&self, index: usize) -> u32 {
        self.files[index].1
    }

    fn image(&self, index: usize) -> Result<Image> {
        decode::read(&self.files[index].0)
    }

    fn problems(&self) -> &Problems {
        &self.problems
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_image_names_count() {
        for name in ["a.jpg", "a.JPEG", "a.Png", "a.b.webp"] {
            assert!(is_image_name(Path::new(name)), "{name}");
        }
        for name in ["a.txt", "jpg", "a.jpg.json", "Thumbs.db", "a"] {
            assert!(!is_image_name(Path::new(name)), "{name}");
        }
    }

    #[test]
    fn listings_are_sorted_and_leave_hidden_files_out() {
        let folder = tempfile::tempdir().unwrap();
        for name in ["b", "a", ".DS_Store", "._a.jpg", "B"] {
            std::fs::write(folder.path().join(name), "").unwrap();
        }
        let names: Vec<String> = list(folder.path()).unwrap().iter().map(|path| folder_name(path)).collect();
        assert_eq!(names, ["B", "a", "b"]);
    }
}
