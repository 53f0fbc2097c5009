//! From files on disk to batches, through the public interface.

use effnetv2::data::{
    BadImages, EvalTransform, Loader, LoaderConfig, Pipeline, Source, Splits, TrainTransform, open,
};
use flate2::{Compression, write::GzEncoder};
use image::{ImageFormat, Rgb, RgbImage};
use std::fs;
use std::io::Write;
use std::path::Path;
use tempfile::TempDir;

/// A 12×10 image of one colour, encoded as `format` whatever the name says.
fn save(path: &Path, color: [u8; 3], format: ImageFormat) {
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    RgbImage::from_pixel(12, 10, Rgb(color)).save_with_format(path, format).unwrap();
}

const RED: [u8; 3] = [250, 10, 10];
const BLUE: [u8; 3] = [10, 10, 250];

/// Classes `blue` and `red`; three and two training images, one validation image each.
fn image_folder() -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path();
    save(&root.join("train/red/1.jpg"), RED, ImageFormat::Jpeg);
    save(&root.join("train/red/2.png"), RED, ImageFormat::Png);
    // As in ImageNet: a PNG that claims to be a JPEG.
    save(&root.join("train/red/3.JPEG"), RED, ImageFormat::Png);
    save(&root.join("train/blue/1.jpg"), BLUE, ImageFormat::Jpeg);
    save(&root.join("train/blue/2.jpg"), BLUE, ImageFormat::Jpeg);
    save(&root.join("val/red/1.png"), RED, ImageFormat::Png);
    save(&root.join("val/blue/1.png"), BLUE, ImageFormat::Png);
    fs::write(root.join("train/red/notes.txt"), "no image").unwrap();
    fs::write(root.join("train/.DS_Store"), "no class").unwrap();
    folder
}

fn open_folder(root: &Path, bad_images: BadImages) -> effnetv2::Result<Splits> {
    open(&Source::parse(root.to_str().unwrap()).unwrap(), bad_images)
}

fn error_of(root: &Path) -> String {
    open_folder(root, BadImages::Skip).unwrap_err().to_string()
}

#[test]
fn an_image_folder_becomes_batches_of_the_right_colours() {
    let folder = image_folder();
    let splits = open_folder(folder.path(), BadImages::Fail).unwrap();
    assert_eq!(splits.train.classes(), ["blue", "red"]);
    assert_eq!((splits.train.len(), splits.validation.len()), (5, 2));
    let transform = TrainTransform { randaugment: None, ..TrainTransform::default() };
    let config = LoaderConfig {
        batch: 5,
        size: 8,
        seed: 3,
        threads: 2,
        prefetch: 1,
        bad_images: BadImages::Fail,
        pipeline: Pipeline::Train(transform),
    };
    let loader = Loader::new(splits.train, config).unwrap();
    let batch = loader.epoch(0, 0).next().unwrap().unwrap();
    let mut labels = batch.labels.clone();
    labels.sort_unstable();
    assert_eq!(labels, [0, 0, 1, 1, 1]);
    for (image, label) in batch.images.chunks_exact(8 * 8 * 3).zip(&batch.labels) {
        let color = if *label == 1 { RED } else { BLUE };
        let near = image.chunks_exact(3).all(|rgb| rgb.iter().zip(color).all(|(a, b)| a.abs_diff(b) <= 4));
        assert!(near, "label {label}: {:?}", &image[..3]);
    }
}

#[test]
fn unusable_images_are_left_out_and_named() {
    let folder = image_folder();
    let red = folder.path().join("train/red");
    fs::write(red.join("4.jpg"), "").unwrap();
    fs::write(red.join("5.png"), "<html>").unwrap();
    fs::write(red.join("6.webp"), b"RIFF\0\0\0\0WEBPVP8 ").unwrap();
    let splits = open_folder(folder.path(), BadImages::Skip).unwrap();
    assert_eq!(splits.train.len(), 5);
    let problems = splits.problems();
    let names: Vec<_> = problems.iter().map(|p| p.path.file_name().unwrap().to_str().unwrap()).collect();
    assert_eq!(names, ["4.jpg", "5.png", "6.webp"]);
    assert!(problems[2].reason.contains("webp is not supported"), "{problems:?}");
    let error = open_folder(folder.path(), BadImages::Fail).unwrap_err().to_string();
    assert!(error.contains("4.jpg") && error.contains("neither JPEG nor PNG"), "{error}");
}

/// A file that cannot even be opened is one bad image, not the end of the run; a folder is no image.
#[cfg(unix)]
#[test]
fn links_that_lead_nowhere_and_folders_are_left_out() {
    let folder = image_folder();
    let red = folder.path().join("train/red");
    std::os::unix::fs::symlink("/nowhere/at/all", red.join("gone.jpg")).unwrap();
    fs::create_dir(red.join("more.png")).unwrap();
    let splits = open_folder(folder.path(), BadImages::Skip).unwrap();
    assert_eq!(splits.train.len(), 5);
    let problems = splits.problems();
    assert_eq!(problems.len(), 1, "{problems:?}");
    assert!(problems[0].path.ends_with("train/red/gone.jpg"), "{problems:?}");
    assert!(problems[0].reason.starts_with("cannot open: "), "{problems:?}");
    let error = open_folder(folder.path(), BadImages::Fail).unwrap_err().to_string();
    assert!(error.contains("gone.jpg: cannot open"), "{error}");
}

/// The header is sound, so opening cannot know; the loader finds out, goes on and tells.
#[test]
fn an_image_cut_short_is_found_while_loading() {
    let folder = image_folder();
    let path = folder.path().join("val/blue/1.png");
    let noise =
        RgbImage::from_fn(40, 40, |x, y| Rgb([(x * 77 + y * 131) as u8, (x * y) as u8, (x ^ y) as u8]));
    noise.save(&path).unwrap();
    let whole = fs::read(&path).unwrap();
    fs::write(&path, &whole[..whole.len() / 2]).unwrap();
    for bad_images in [BadImages::Skip, BadImages::Fail] {
        let splits = open_folder(folder.path(), bad_images).unwrap();
        assert!(splits.problems().is_empty());
        let pipeline = Pipeline::Eval(EvalTransform::default());
        let config =
            LoaderConfig { batch: 2, size: 8, seed: 0, threads: 1, prefetch: 0, bad_images, pipeline };
        let loader = Loader::new(splits.validation.clone(), config).unwrap();
        let result = loader.epoch(0, 0).next().unwrap();
        match bad_images {
            BadImages::Skip => assert_eq!(result.unwrap().indices, [1, 1]),
            BadImages::Fail => assert!(result.unwrap_err().to_string().contains("1.png")),
        }
        assert_eq!(splits.problems().len(), usize::from(bad_images == BadImages::Skip));
    }
}

#[test]
fn wrong_folders_are_errors_that_tell_what_to_do() {
    let broken = |change: &dyn Fn(&Path)| {
        let folder = image_folder();
        change(folder.path());
        error_of(folder.path())
    };
    let cases: [(String, &[&str]); 7] = [
        (broken(&|root| fs::remove_dir_all(root.join("val")).unwrap()), &["no folder `val`"]),
        (
            broken(&|root| fs::remove_dir_all(root.join("val/red")).unwrap()),
            &["class `red` is in train/ but not in val/"],
        ),
        (
            broken(&|root| save(&root.join("val/green/1.png"), BLUE, ImageFormat::Png)),
            &["class `green` is in val/ but not in train/"],
        ),
        (
            broken(&|root| fs::create_dir(root.join("train/empty")).unwrap()),
            &["empty", "a class without images"],
        ),
        (
            broken(&|root| fs::write(root.join("val/red/1.png"), "?").unwrap()),
            &["none of the images of this class", "1.png", "neither JPEG nor PNG"],
        ),
        (
            broken(&|root| {
                fs::remove_dir_all(root.join("train")).unwrap();
                fs::create_dir(root.join("train")).unwrap();
            }),
            &["no class folders"],
        ),
        (
            broken(&|root| {
                fs::remove_dir_all(root.join("train")).unwrap();
                fs::remove_dir_all(root.join("val")).unwrap();
            }),
            &["no data set found here", "train/<class>/*", "train-images-idx3-ubyte"],
        ),
    ];
    for (error, messages) in cases {
        assert!(messages.iter().all(|message| error.contains(message)), "{error}");
    }
    assert!(
        error_of(Path::new("/nowhere/at/all"))
            .contains("/nowhere/at/all: there is no such folder; expected `digits`")
    );
    let file = tempfile::NamedTempFile::new().unwrap();
    assert!(error_of(file.path()).contains("this is a file"));
}

#[test]
fn an_idx_folder_is_recognised() {
    let folder = tempfile::tempdir().unwrap();
    for (part, count) in [("train", 6u8), ("t10k", 3)] {
        let images =
            [&[0, 0, 8, 3, 0, 0, 0, count, 0, 0, 0, 2, 0, 0, 0, 2], &vec![9; usize::from(count) * 4][..]];
        let labels = [&[0, 0, 8, 1, 0, 0, 0, count], &(0..count).collect::<Vec<u8>>()[..]];
        let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
        encoder.write_all(&images.concat()).unwrap();
        let path = folder.path().join(format!("{part}-images-idx3-ubyte.gz"));
        fs::write(path, encoder.finish().unwrap()).unwrap();
        fs::write(folder.path().join(format!("{part}-labels-idx1-ubyte")), labels.concat()).unwrap();
    }
    let splits = open_folder(folder.path(), BadImages::Skip).unwrap();
    assert_eq!((splits.train.len(), splits.validation.len(), splits.train.classes().len()), (6, 3, 6));
    fs::remove_file(folder.path().join("t10k-labels-idx1-ubyte")).unwrap();
    assert!(error_of(folder.path()).contains("`t10k-labels-idx1-ubyte` (or .gz) is missing"));
}

/// The order, once and for all: a checkpoint made by any build resumes in any other. The figures were computed apart from
/// this program (Philox and Fisher–Yates in Python).
#[test]
fn the_digits_come_in_the_same_order_everywhere() {
    let splits = open(&Source::Digits, BadImages::Fail).unwrap();
    let config = LoaderConfig {
        batch: 6,
        size: 8,
        seed: 42,
        threads: 2,
        prefetch: 1,
        bad_images: BadImages::Fail,
        pipeline: Pipeline::Train(TrainTransform::plain()),
    };
    let loader = Loader::new(splits.train, config).unwrap();
    let batch = loader.epoch(1, 7).next().unwrap().unwrap();
    assert_eq!(batch.indices, [897, 1071, 1232, 1322, 1430, 984]);
}
