//! The metrics of a run as JSON lines: one record a line, appended as it happens.
//!
//! A run may be killed at any moment, also in the middle of a line. Such a torn last line is dropped, by the reader and
//! by the next writer; a broken line anywhere else is an error. A run resumed from a checkpoint first drops what came
//! after that checkpoint ([`retain`]), so that the file reads as if the run had never been interrupted.

use crate::{Error, Result};
use serde::Serialize;
use serde::de::{DeserializeOwned, IgnoredAny};
use std::fs::{self, File, OpenOptions};
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};

/// Appends records to a file.
#[derive(Debug)]
pub struct MetricsWriter {
    path: PathBuf,
    file: File,
}

impl MetricsWriter {
    /// Opens `path` to append, creating it if it does not exist and dropping a torn last line.
    ///
    /// # Errors
    /// [`Error::Io`] when the file cannot be created, read or written.
    pub fn append(path: &Path) -> Result<Self> {
        let text = read_if_present(path)?;
        let mut file = OpenOptions::new()
            .create(true)
            .append(true)
            .open(path)
            .map_err(Error::io(path, "open for appending"))?;
        let whole = whole_length(&text);
        if whole < text.len() {
            file.set_len(whole as u64).map_err(Error::io(path, "drop the torn last line of"))?;
        } else if !text.is_empty() && !text.ends_with(b"\n") {
            file.write_all(b"\n").map_err(Error::io(path, "write"))?;
        }
        Ok(Self { path: path.to_owned(), file })
    }

    /// Appends `record` as one line and hands it to the operating system at once. It must be a struct or a map. JSON
    /// has no NaN and no infinity: such a number is written as `null`, to be read back as an `Option`.
    ///
    /// # Errors
    /// [`Error::Io`] when the record cannot be written, or not be expressed in JSON.
    pub fn write(&mut self, record: &impl Serialize) -> Result<()> {
        let mut line = serde_json::to_vec(record)
            .map_err(|source| Error::io(&self.path, "express a record for")(source.into()))?;
        line.push(b'\n');
        self.file.write_all(&line).map_err(Error::io(&self.path, "write"))
    }
}

/// All records of the file, oldest first; a torn last line is left out.
///
/// # Errors
/// [`Error::Io`] when the file cannot be read; [`Error::File`], with the number of the line, when another line than the
/// last does not hold a `T`.
pub fn read<T: DeserializeOwned>(path: &Path) -> Result<Vec<T>> {
    let text = fs::read(path).map_err(Error::io(path, "read"))?;
    lines(&text)
        .map(|(number, line)| {
            serde_json::from_slice(line).map_err(|error| broken_line(path, number, &error.to_string()))
        })
        .collect()
}

/// Keeps the records that `keep` says, and returns how many were dropped. The bytes of whatever stays are untouched. A file
/// that does not exist has nothing to drop.
///
/// The file is replaced in one move: an interruption leaves the old one or the new one.
///
/// # Errors
/// [`Error::Io`] when the file cannot be read or replaced; [`Error::File`] when another line than the last does not hold a
/// `T`.
pub fn retain<T: DeserializeOwned>(path: &Path, keep: impl Fn(&T) -> bool) -> Result<usize> {
    let text = read_if_present(path)?;
    let (mut kept, mut dropped) = (Vec::with_capacity(text.len()), 0);
    for (number, line) in lines(&text) {
        let record =
            serde_json::from_slice(line).map_err(|error| broken_line(path, number, &error.to_string()))?;
        if keep(&record) {
            kept.extend_from_slice(line);
            kept.push(b'\n');
        } else {
            dropped += 1;
        }
    }
    if kept != text {
        replace(path, &kept)?;
    }
    Ok(dropped)
}

/// The whole, non-empty lines with their numbers from 1.
fn lines(text: &[u8]) -> impl Iterator<Item = (usize, &[u8])> {
    let whole = &text[..whole_length(text)];
    whole
        .split(|&byte| byte == b'\n')
        .zip(1..)
        .map(|(line, number)| (number, line))
        .filter(|(_, l)| !l.is_empty())
}

/// The length of `text` without a torn last line: one without a line break that is not JSON either.
fn whole_length(text: &[u8]) -> usize {
    let last = text.iter().rposition(|&byte| byte == b'\n').map_or(0, |at| at + 1);
    if serde_json::from_slice::<IgnoredAny>(&text[last..]).is_ok() { text.len() } else { last }
}

fn read_if_present(path: &Path) -> Result<Vec<u8>> {
    match fs::read(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(Vec::new()),
        result => result.map_err(Error::io(path, "read")),
    }
}

fn replace(path: &Path, text: &[u8]) -> Result<()> {
    let mut name = path.as_os_str().to_owned();
    name.push(".new");
    let new = PathBuf::from(name);
    let mut file = File::create(&new).map_err(Error::io(&new, "create"))?;
    file.write_all(text).and_then(|()| file.sync_all()).map_err(Error::io(&new, "write"))?;
    fs::rename(&new, path).map_err(Error::io(path, "replace"))
}

fn broken_line(path: &Path, number: usize, problem: &str) -> Error {
    Error::file(
        path,
        format!("line {number} is not a record of metrics ({problem}); repair or remove the line"),
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde::Deserialize;

    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    struct Record {
        step: u64,
        loss: f64,
    }

    fn record(step: u64) -> Record {
        Record { step, loss: 1.0 / (step as f64 + 3.0) }
    }

    fn steps(path: &Path) -> Vec<u64> {
        read::<Record>(path).unwrap().iter().map(|record| record.step).collect()
    }

    #[test]
    fn records_come_back_exactly_and_at_once() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("metrics.jsonl");
        let mut writer = MetricsWriter::append(&path).unwrap();
        for step in 0..5 {
            writer.write(&record(step)).unwrap();
            assert_eq!(steps(&path), (0..=step).collect::<Vec<_>>());
        }
        drop(writer);
        MetricsWriter::append(&path).unwrap().write(&record(5)).unwrap();
        assert_eq!(read::<Record>(&path).unwrap(), (0..6).map(record).collect::<Vec<_>>());
    }

    #[test]
    fn a_torn_last_line_is_dropped_wherever_it_was_torn() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("metrics.jsonl");
        let first = "{\"step\":1,\"loss\":0.5}\n";
        let second = "{\"step\":2,\"loss\":0.25}";
        for length in 0..=second.len() {
            fs::write(&path, [first, &second[..length]].concat()).unwrap();
            // Only the line break is missing from the last of these.
            let expected: &[u64] = if length == second.len() { &[1, 2] } else { &[1] };
            assert_eq!(steps(&path), expected, "{length} bytes");
            MetricsWriter::append(&path).unwrap().write(&record(9)).unwrap();
            assert_eq!(steps(&path), [expected, &[9]].concat(), "{length} bytes");
        }
    }

    #[test]
    fn a_broken_line_elsewhere_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("metrics.jsonl");
        fs::write(&path, "{\"step\":1,\"loss\":0.5}\n{\"step\":2,\"lo\n{\"step\":3,\"loss\":0.5}\n").unwrap();
        for error in [read::<Record>(&path).unwrap_err(), retain(&path, |_: &Record| true).unwrap_err()] {
            assert!(error.to_string().contains("metrics.jsonl: line 2 is not"), "{error}");
        }
        let missing = read::<Record>(&folder.path().join("none.jsonl")).unwrap_err();
        assert!(matches!(missing, Error::Io { .. }));
    }

    #[test]
    fn a_resumed_run_drops_what_came_after_its_checkpoint() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("metrics.jsonl");
        #[derive(Deserialize)]
        struct Position {
            step: Option<u64>,
        }
        let up_to_20 = |record: &Position| record.step.is_none_or(|step| step <= 20);
        let header = "{ \"model\": \"b0\" }\n";
        let kept = "{\"step\":10, \"loss\":0.5}\n{\"step\":20,\"loss\":0.25,\"more\":1e0}\n";
        fs::write(
            &path,
            [header, kept, "{\"step\":21,\"loss\":0.2}\n{\"step\":30,\"loss\":0.1}\n{\"st"].concat(),
        )
        .unwrap();
        assert_eq!(retain(&path, up_to_20).unwrap(), 2);
        assert_eq!(fs::read_to_string(&path).unwrap(), [header, kept].concat());
        assert_eq!(retain(&path, up_to_20).unwrap(), 0);
        assert_eq!(fs::read_to_string(&path).unwrap(), [header, kept].concat());
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
        assert_eq!(retain(&folder.path().join("none.jsonl"), up_to_20).unwrap(), 0);
    }
}
