//! The program as its users meet it: what it says and how it ends, also when everything goes wrong.

mod runs;

use effnetv2::train::checkpoint::Checkpoint;
use effnetv2::train::run::{CHECKPOINT, METRICS};
use image::{ImageFormat, Rgb, RgbImage};
use runs::{ON_IMAGES, Outcome, effnetv2, images, lines, program, succeed, untrained, wait_until, write};
use std::fs;
use std::path::Path;
use tempfile::TempDir;

/// A run of one epoch of 11 steps.
const TINY: &str = "model = 'nano'\nepochs = 1\nbatch = 128\n[progressive]\nimage_size = [32, 32]\n";

fn folder() -> TempDir {
    tempfile::tempdir().unwrap()
}

/// Runs `effnetv2` in `folder`, which must end with `code` and one line on standard error that says all of `says`.
fn fail(folder: &Path, args: &[&str], code: i32, says: &[&str]) {
    let Outcome { code: found, err, .. } = effnetv2(folder, args);
    assert_eq!(found, Some(code), "{args:?}: {err}");
    assert!(err.starts_with("error: "), "{args:?}: {err}");
    for text in says {
        assert!(err.contains(text), "{args:?} should say {text:?}: {err}");
    }
}

#[test]
fn a_wrong_flag_is_named_with_its_value_and_what_would_work() {
    let folder = folder();
    let here = folder.path();
    for (args, says) in [
        (&["--model", "huge"][..], &["--model = huge", "v1-b7", "nano"][..]),
        (&["--batch", "0"], &["--batch = 0", "at least 1"]),
        (&["--batch", "-1"], &["'-1'", "--batch"]),
        (&["--model", "b0", "--batch", "1", "--size", "32"], &["--batch = 1", "batch of 2 or more"]),
        (&["--size", "31"], &["--size = 31", "at least 32"]),
        (&["--size", "16385"], &["--size = 16385", "at most 16384"]),
        (&["--eval-size", "8"], &["--eval-size = 8", "at least 32"]),
        (&["--size", "48", "--first-size", "64"], &["--first-size = 64", "above that of the last stage, 48"]),
        (&["--first-size", "16"], &["--first-size = 16", "at least 32"]),
        (&["--epochs", "0"], &["--epochs = 0", "at least 1"]),
        (&["--epochs", "3", "--progressive", "4"], &["--progressive = 4", "3 epochs"]),
        (&["--lr", "nan"], &["--lr = NaN", "positive"]),
        (&["--lr", "-1"], &["--lr = -1", "positive"]),
        (&["--warmup", "99"], &["--warmup = 99", "must not exceed"]),
        (&["--weight-decay", "-1"], &["--weight-decay = -1", "at least 0"]),
        (&["--label-smoothing", "1"], &["--label-smoothing = 1", "[0, 1)"]),
        (&["--dropout", "1"], &["--dropout = 1", "[0, 1)"]),
        (&["--ema", "2"], &["--ema = 2", "[0, 1)"]),
        (&["--mixup", "1e9"], &["--mixup = 1000000000", "from 0.001 to 1000"]),
        (&["--cutmix", "-1"], &["--cutmix = -1", "at least 0"]),
        (&["--randaugment", "31"], &["--randaugment = 31", "0 to 30"]),
        (&["--optimizer", "lion"], &["'lion'", "--optimizer", "rmsprop, sgd, adamw"]),
        (&["--threads", "99999"], &["'99999'", "--threads"]),
        (&["--data", ""], &["data = \"\"", "digits"]),
        (&["--modle", "b0"], &["--modle", "--model"]),
        (&["--resume", "run", "--seed", "3"], &["cannot be used with '--resume <DIR>'"]),
    ] {
        fail(here, &[&["train", "--out", "never"], args].concat(), 2, says);
    }
    fail(here, &["summary", "huge"], 2, &["model = huge", "v1-b7"]);
    fail(here, &["summary", "b0", "--size", "31"], 2, &["--size = 31", "at least 32"]);
    fail(here, &["summary", "b0", "--classes", "0"], 2, &["--classes"]);
    fail(here, &["eval", "run", "--size", "31"], 2, &["--size = 31", "at least 32"]);
    fail(here, &["predict", "run", "a.png", "--top", "0"], 2, &["--top = 0", "at least 1"]);
    assert!(!here.join("never").exists(), "a refused request leaves no folder");
}

#[test]
fn a_wrong_configuration_is_named_by_file_key_and_value() {
    let folder = folder();
    for (text, code, says) in [
        ("modle = 's'", 2, &["modle = \"s\"", "unknown field", "`model`", "wrong.toml"][..]),
        ("batch = -3", 2, &["batch = -3", "a whole number", "wrong.toml"]),
        ("seed = 'x'", 2, &["seed = \"x\"", "a whole number", "wrong.toml"]),
        ("batch = 0", 2, &["batch = 0", "at least 1"]),
        ("[progressive]\nimage_size = [31, 64]", 2, &["progressive.image_size = 31", "at least 32"]),
        ("[progressive]\nsizes = [32, 64]", 2, &["progressive", "`sizes`", "image_size", "wrong.toml"]),
        ("[optimizer]\nrule = 'lion'", 2, &["optimizer", "lion", "rmsprop", "wrong.toml"]),
        ("epochs = 3\nmodel = s", 1, &["wrong.toml: line 2 is not valid TOML", "quoted"]),
    ] {
        write(folder.path(), "wrong.toml", text);
        fail(folder.path(), &["train", "--config", "wrong.toml"], code, says);
    }
    fail(folder.path(), &["train", "--config", "none.toml"], 1, &["none.toml", "cannot read"]);
}

#[test]
fn data_that_cannot_be_used_is_named() {
    let folder = folder();
    let here = folder.path();
    let train = |says: &[&str]| fail(here, &ON_IMAGES, 1, says);
    train(&["data: there is no such folder; expected `digits` or a folder with"]);
    fs::create_dir(here.join("data")).unwrap();
    train(&["data: no data set found here", "train/<class>"]);
    images(&here.join("data"));
    let extra = here.join("data/train/green");
    fs::create_dir(&extra).unwrap();
    train(&["green: a class without images"]);
    fs::copy(here.join("data/train/red/0.png"), extra.join("0.png")).unwrap();
    train(&["class `green` is in train/ but not in val/"]);
    for name in ["train/green", "train/red", "val/red"] {
        fs::remove_dir_all(here.join("data").join(name)).unwrap();
    }
    fail(here, &ON_IMAGES, 2, &["--data = data", "single class"]);
    assert!(!here.join("run").exists());
}

/// A file that is no image, an empty file, an image without pixels, and a JPEG cut short, which only decoding finds.
fn spoil(data: &Path) -> [&'static str; 4] {
    let red = data.join("train/red");
    write(&red, "text.png", "not a picture");
    write(&red, "empty.jpg", "");
    let mut pixels = fs::read(red.join("0.png")).unwrap();
    pixels[16..20].fill(0); // The width in a PNG's header.
    fs::write(red.join("flat.png"), pixels).unwrap();
    let speckled = RgbImage::from_fn(64, 64, |x, y| Rgb([(x * 37 + y * 91) as u8, (x * y) as u8, 7]));
    speckled.save_with_format(red.join("torn.jpg"), ImageFormat::Jpeg).unwrap();
    let whole = fs::read(red.join("torn.jpg")).unwrap();
    fs::write(red.join("torn.jpg"), &whole[..whole.len() - 200]).unwrap();
    ["text.png", "empty.jpg", "flat.png", "torn.jpg"]
}

#[test]
fn bad_images_are_named_and_passed_over() {
    let folder = folder();
    images(&folder.path().join("data"));
    let bad = spoil(&folder.path().join("data"));
    let Outcome { code, err, .. } = effnetv2(folder.path(), &ON_IMAGES);
    assert_eq!(code, Some(0), "{err}");
    assert!(err.starts_with("4 images could not be used:"), "{err}");
    for name in bad {
        assert!(err.contains(&format!("data/train/red/{name}: ")), "{name}: {err}");
    }
}

#[test]
fn strict_stops_at_a_bad_image_and_keeps_the_steps_before_it() {
    let folder = folder();
    let here = folder.path();
    images(&here.join("data"));
    spoil(&here.join("data"));
    let strict = [&ON_IMAGES[..], &["--strict"]].concat();
    fail(here, &strict, 1, &["data/train/red/empty.jpg: "]);
    assert!(!here.join("run").exists(), "found before the run began");
    for name in ["text.png", "empty.jpg", "flat.png"] {
        fs::remove_file(here.join("data/train/red").join(name)).unwrap();
    }
    // An epoch is two of the nine images' batches, so it takes a few until the torn one comes up.
    let Outcome { code, err, .. } = effnetv2(here, &[&strict[..], &["--epochs", "9"]].concat());
    assert_eq!(code, Some(2), "--epochs twice: {err}");
    let longer: Vec<&str> = strict.iter().map(|&arg| if arg == "2" { "9" } else { arg }).collect();
    let Outcome { code, err, .. } = effnetv2(here, &longer);
    assert_eq!(code, Some(1), "{err}");
    assert!(err.contains("error: data/train/red/torn.jpg: the file is cut short"), "{err}");
    assert!(err.contains("mend this and go on with `effnetv2 train --resume run`"), "{err}");
    fs::copy(here.join("data/train/red/0.png"), here.join("data/train/red/torn.jpg")).unwrap();
    let out = succeed(here, &["train", "--resume", "run"]);
    assert!(out.contains("going on after step") && out.contains("epoch   9/9"), "{out}");
}

#[test]
fn a_checkpoint_that_does_not_fit_is_explained() {
    let folder = folder();
    let here = folder.path();
    let whole = fs::read(untrained(&here.join("good"), |_| {})).unwrap();
    untrained(&here.join("model"), |d| d.config.model = "b0".into());
    untrained(&here.join("classes"), |d| d.classes.truncate(9));
    untrained(&here.join("future"), |d| d.format_version = 99);
    untrained(&here.join("size"), |d| d.config.eval_size = 3);
    fs::write(here.join("torn.safetensors"), &whole[..whole.len() / 2]).unwrap();
    write(here, "text.safetensors", "neither weights nor tensors");
    let tensors: [(&str, safetensors::tensor::TensorView<'_>); 0] = [];
    fs::write(here.join("other.safetensors"), safetensors::serialize(tensors, None).unwrap()).unwrap();
    fs::create_dir(here.join("empty")).unwrap();
    for (name, says) in [
        ("none", "none: cannot read"),
        ("empty", "empty: no checkpoint.safetensors in this folder"),
        ("model", "belongs to another model"),
        ("future", "format version 99"),
        (
            "size",
            "size/checkpoint.safetensors: its configuration cannot work (eval_size = 3: must be at least 32",
        ),
        ("torn.safetensors", "torn.safetensors: truncated or damaged"),
        ("text.safetensors", "text.safetensors: not a safetensors file"),
        ("other.safetensors", "no checkpoint of this program"),
    ] {
        for command in [&["eval", name][..], &["predict", name, "a.png"], &["train", "--resume", name]] {
            fail(here, command, 1, &[says]);
        }
    }
    fail(here, &["predict", "classes", "a.png"], 1, &["classifier.weight", "number of classes"]);
    fail(here, &["eval", "good", "--data", "nowhere"], 1, &["nowhere: there is no such folder"]);
    images(&here.join("data"));
    fail(here, &["eval", "good", "--data", "data"], 2, &["--data = data", "2 classes", "10"]);
}

#[test]
fn a_folder_that_holds_a_run_is_never_overwritten() {
    let folder = folder();
    let here = folder.path();
    let before = fs::read(untrained(&here.join("run"), |_| {})).unwrap();
    fail(here, &["train", "--out", "run"], 1, &["run: already holds a run", "--resume", "--out"]);
    assert_eq!(fs::read(here.join("run").join(CHECKPOINT)).unwrap(), before);
    fs::remove_file(here.join("run").join(CHECKPOINT)).unwrap();
    fail(
        here,
        &["train", "--out", "run"],
        1,
        &["run: holds a run that ended before its first checkpoint", "--out"],
    );
    let says = ["run: this run ended before its first checkpoint", "train --config run/config.toml"];
    fail(here, &["train", "--resume", "run"], 1, &says);
}

#[test]
fn a_run_that_diverges_stops_and_keeps_its_last_good_checkpoint() {
    let folder = folder();
    write(folder.path(), "tiny.toml", TINY);
    let train = ["train", "--config", "tiny.toml", "--checkpoint-every", "1", "--optimizer", "sgd"];
    // The rate warms up from 0, so the first step changes nothing and the second everything.
    for (name, rate, reason, last) in [
        ("infinite", "1e45", "step 2 in epoch 1 has weights that are not finite", "after step 1\n"),
        ("large", "1e30", "step 3 in epoch 1 has loss NaN", "after step 2\n"),
    ] {
        let args = [&train[..], &["--warmup", "0.2", "--lr", rate, "--out", name]].concat();
        fail(folder.path(), &args, 1, &[reason, &format!("{name}/{CHECKPOINT}"), "Lower the learning rate"]);
        let out = succeed(folder.path(), &["eval", name]);
        assert!(out.contains(last) && out.contains("355 images"), "{out}");
    }
}

#[cfg(unix)]
mod on_unix {
    use super::*;
    use runs::untrained;
    use std::process::Command;

    fn send(signal: &str, process: u32) {
        assert!(Command::new("kill").args([signal, &process.to_string()]).status().unwrap().success());
    }

    #[test]
    fn ctrl_c_ends_a_run_after_its_step_with_a_checkpoint() {
        let folder = folder();
        let (here, run) = (folder.path(), folder.path().join("run"));
        write(here, "tiny.toml", TINY);
        let child = program(here, &["train", "--config", "tiny.toml", "--epochs", "500", "--out", "run"])
            .spawn()
            .unwrap();
        wait_until("two steps", || lines(&run.join(METRICS)) >= 2);
        send("-INT", child.id());
        let Outcome { code, err, .. } = child.wait_with_output().unwrap().into();
        assert_eq!(code, Some(130), "{err}");
        assert!(err.contains("stopping after this step"), "{err}");
        assert!(err.contains("go on with `effnetv2 train --resume run`"), "{err}");
        let step = Checkpoint::read(&run).unwrap().description.position.step;
        assert!(err.contains(&format!("stopped after step {step};")), "{err}");
        let last = fs::read_to_string(run.join(METRICS)).unwrap();
        assert!(last.lines().last().unwrap().contains(&format!("\"step\":{step},")), "{last}");
    }

    /// A memory file system that has room for one checkpoint and not for two; unmounted when dropped.
    struct SmallDisk<'a>(&'a Path);

    impl<'a> SmallDisk<'a> {
        fn mount(place: &'a Path) -> Option<Self> {
            let mut mount = Command::new("mount");
            mount.args(["-t", "tmpfs", "-o", "size=1200k", "tmpfs"]).arg(place);
            mount.output().is_ok_and(|output| output.status.success()).then_some(Self(place))
        }
    }

    impl Drop for SmallDisk<'_> {
        fn drop(&mut self) {
            let unmounted = Command::new("umount").arg(self.0).status();
            assert!(unmounted.is_ok_and(|status| status.success()) || std::thread::panicking());
        }
    }

    #[test]
    fn a_full_disk_leaves_the_last_checkpoint_intact() {
        let folder = folder();
        let here = folder.path();
        let Some(disk) = SmallDisk::mount(here) else {
            println!("skipped: no right to mount a small disk; a file size limit is tested beside it");
            return;
        };
        let before = fs::read(untrained(&here.join("run"), |_| {})).unwrap();
        fail(
            here,
            &["train", "--resume", "run"],
            1,
            &["run/checkpoint.safetensors: cannot write: No space left", "make room", "train --resume run`"],
        );
        assert_eq!(fs::read(here.join("run").join(CHECKPOINT)).unwrap(), before);
        assert!(!here.join("run/checkpoint.safetensors.part").exists(), "the part written is of no use");
        drop(disk);
    }

    /// A limit on the size of files ends the process by the signal SIGXFSZ, or, where that is ignored, is an error.
    #[test]
    fn a_file_size_limit_leaves_the_last_checkpoint_intact() {
        let folder = folder();
        let here = folder.path();
        let before = fs::read(untrained(&here.join("run"), |_| {})).unwrap();
        for ignored in [false, true] {
            let trap = if ignored { "trap '' XFSZ; " } else { "" };
            let script = format!("ulimit -c 0; ulimit -f 200; {trap}exec \"$0\" train --resume run");
            let mut shell = Command::new("sh");
            shell.current_dir(here).args(["-c", &script, env!("CARGO_BIN_EXE_effnetv2")]);
            let Outcome { code, err, .. } = shell.output().unwrap().into();
            assert_eq!(code, ignored.then_some(1), "{err}");
            assert_eq!(
                err.contains("run/checkpoint.safetensors: cannot write: File too large"),
                ignored,
                "{err}"
            );
            assert_eq!(fs::read(here.join("run").join(CHECKPOINT)).unwrap(), before);
        }
        succeed(here, &["train", "--resume", "run"]);
        let names: Vec<_> = fs::read_dir(here.join("run")).unwrap().map(|e| e.unwrap().file_name()).collect();
        assert_eq!(names.len(), 4, "config, metrics, curves and one checkpoint: {names:?}");
    }

    #[test]
    fn a_reader_that_has_seen_enough_is_no_error_and_a_full_disk_is() {
        let folder = folder();
        let mut child = program(folder.path(), &["summary", "b0"]);
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let Outcome { code, err, .. } = child.stdout(writer).output().unwrap().into();
        assert_eq!((code, err.as_str()), (Some(0), ""));
        if let Ok(full) = fs::File::options().write(true).open("/dev/full") {
            let Outcome { code, err, .. } = child.stdout(full).output().unwrap().into();
            assert_eq!(code, Some(1), "{err}");
            assert!(err.contains("standard output: cannot write: No space left"), "{err}");
        }
    }
}

#[test]
fn predict_classifies_what_it_can() {
    let folder = folder();
    let here = folder.path();
    untrained(&here.join("run"), |_| {});
    RgbImage::from_pixel(20, 30, Rgb([200; 3])).save(here.join("good.png")).unwrap();
    write(here, "bad.png", "not a picture");
    let images = ["predict", "run", "bad.png", "none.png", "good.png"];
    let Outcome { code, out, err } = effnetv2(here, &images);
    assert_eq!(code, Some(1));
    assert!(err.contains("bad.png: neither JPEG nor PNG") && err.contains("none.png: cannot read"), "{err}");
    assert!(err.contains("2 of 3 images could not be classified"), "{err}");
    assert!(out.starts_with("good.png\n") && out.lines().count() == 6, "{out}");
    let Outcome { code, out, err } = effnetv2(here, &[&images[..], &["--strict"]].concat());
    assert_eq!((code, out.as_str()), (Some(1), ""), "{err}");
    assert!(err.starts_with("error: bad.png: "), "{err}");
}

#[test]
fn predict_gives_json() {
    let folder = folder();
    let here = folder.path();
    untrained(&here.join("run"), |_| {});
    for (name, grey) in [("a.png", 10), ("b \"quoted\".png", 250)] {
        RgbImage::from_pixel(32, 32, Rgb([grey; 3])).save(here.join(name)).unwrap();
    }
    let out = succeed(here, &["predict", "run", "--json", "--top", "99", "a.png", "b \"quoted\".png"]);
    let lines: Vec<serde_json::Value> = out.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(lines.len(), 2);
    assert_eq!((&lines[0]["image"], &lines[1]["image"]), (&"a.png".into(), &"b \"quoted\".png".into()));
    for line in &lines {
        let classes = line["classes"].as_array().unwrap();
        let probabilities: Vec<f64> = classes.iter().map(|c| c["probability"].as_f64().unwrap()).collect();
        let mut names: Vec<&str> = classes.iter().map(|c| c["class"].as_str().unwrap()).collect();
        assert!(probabilities.is_sorted_by(|a, b| a >= b), "{line}");
        assert!((probabilities.iter().sum::<f64>() - 1.0).abs() < 1e-9, "{line}");
        names.sort_unstable();
        assert_eq!(names, ["0", "1", "2", "3", "4", "5", "6", "7", "8", "9"]);
    }
}

/// The parameter counts of timm (V2) and torchvision (V1), and of `nano` by hand.
#[test]
fn summary_prints_the_published_totals() {
    let totals = [
        ("b0", "7,139,704"),
        ("b1", "8,141,052"),
        ("b2", "10,096,086"),
        ("b3", "14,358,406"),
        ("s", "21,458,488"),
        ("m", "54,139,356"),
        ("l", "118,515,272"),
        ("xl", "208,119,808"),
        ("v1-b0", "5,288,548"),
        ("v1-b1", "7,794,184"),
        ("v1-b2", "9,109,994"),
        ("v1-b3", "12,233,232"),
        ("v1-b4", "19,341,616"),
        ("v1-b5", "30,389,784"),
        ("v1-b6", "43,040,704"),
        ("v1-b7", "66,347,960"),
        ("nano", "106,672"),
    ];
    let folder = folder();
    let names: Vec<&str> = effnetv2::model::Architecture::names().collect();
    assert_eq!(names, totals.map(|(name, _)| name));
    for (name, parameters) in totals {
        let out = succeed(folder.path(), &["summary", name]);
        let total = out.lines().find(|line| line.starts_with("total")).unwrap();
        assert_eq!(total.split_whitespace().nth(1), Some(parameters), "{out}");
    }
    let alias =
        succeed(folder.path(), &["summary", "tf_efficientnetv2_s", "--classes", "10", "--size", "300"]);
    assert!(alias.starts_with("s, 300 × 300 pixels, 10 classes\n"), "{alias}");
}

#[test]
fn help_tells_every_default() {
    let folder = folder();
    let overview = succeed(folder.path(), &["--help"]);
    for command in ["demo", "train", "eval", "predict", "summary"] {
        assert!(overview.contains(command), "{overview}");
        let help = succeed(folder.path(), &[command, "--help"]);
        let (options, recipe) =
            help.split_once("Recipe [defaults: those of the model").unwrap_or((&help, ""));
        let flags = options.split("\n      --").skip(1);
        for flag in flags {
            let switch = !flag.lines().next().unwrap().contains('<');
            let optional = ["config", "init", "resume"].iter().any(|name| flag.starts_with(name));
            assert!(switch || optional || flag.contains("[default: "), "{command} --{flag}");
        }
        assert_eq!(command == "train", recipe.contains("--label-smoothing"));
    }
}

#[test]
fn output_that_is_no_terminal_has_no_control_characters() {
    let folder = folder();
    write(folder.path(), "tiny.toml", TINY);
    for args in [
        &["--help"][..],
        &["train", "--help"],
        &["train", "--config", "tiny.toml", "--out", "run"],
        &["train", "--resume", "run"],
        &["eval", "run"],
        &["predict", "run", "tiny.toml"],
        &["summary", "nano"],
        &["train", "--batch", "x"],
    ] {
        let Outcome { out, err, .. } = effnetv2(folder.path(), args);
        for text in [out, err] {
            assert!(!text.contains(|c: char| c.is_control() && c != '\n'), "{args:?}: {text:?}");
        }
    }
    let out = succeed(folder.path(), &["train", "--resume", "run"]);
    assert!(out.contains("all 1 epochs are done, after step 11; only measuring"), "{out}");
    assert!(out.contains("held-out accuracy"), "{out}");
}
