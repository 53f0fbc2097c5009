//! A shared list of the images that could not be used, so that a run can go on and still name every one of them.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

/// What to do about an image that cannot be decoded or has no pixels.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum BadImages {
    /// Leave it out, or put the next decodable one in its place, and report it.
    #[default]
    Skip,
    /// Stop with an error.
    Fail,
}

/// An image that could not be used, and why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// The file.
    pub path: PathBuf,
    /// What is wrong with it.
    pub reason: String,
}

/// The problems met so far, each file once, ordered by path. Clones share one list.
#[derive(Clone, Debug, Default)]
pub struct Problems(Arc<Mutex<BTreeMap<PathBuf, String>>>);

impl Problems {
    /// Notes that `path` is unusable; the first reason for a path stays.
    pub fn record(&self, path: &Path, reason: impl Into<String>) {
        let mut list = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        list.entry(path.to_owned()).or_insert_with(|| reason.into());
    }

    /// How many files are unusable.
    pub fn count(&self) -> usize {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).len()
    }

    /// All of them, ordered by path.
    pub fn list(&self) -> Vec<Problem> {
        let list = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        list.iter().map(|(path, reason)| Problem { path: path.clone(), reason: reason.clone() }).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_file_is_counted_once_and_clones_share() {
        let problems = Problems::default();
        let shared = problems.clone();
        problems.record(Path::new("b.png"), "cut short");
        shared.record(Path::new("b.png"), "again");
        shared.record(Path::new("a.png"), "empty");
        assert_eq!(problems.count(), 2);
        let expected = [("a.png", "empty"), ("b.png", "cut short")]
            .map(|(p, r)| Problem { path: p.into(), reason: r.into() });
        assert_eq!(problems.list(), expected);
    }
}
