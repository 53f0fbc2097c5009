//! The JSON that every measurement leaves, ours and the peers'.

use super::machine::{Machine, commit};
use crate::{Error, Result};
use serde::{Deserialize, Serialize};
use std::fs;
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

/// The version of the format.
pub const SCHEMA: u32 = 1;

/// Results, and all that is needed to read them later.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Report<R> {
    /// [`SCHEMA`].
    pub schema: u32,
    /// What was asked for, as it can be asked again.
    pub command: Vec<String>,
    /// What computed.
    pub tool: Tool,
    /// On what.
    pub machine: Machine,
    /// When, UTC: `2026-11-24T15:04:05Z`.
    pub date: String,
    /// The figures.
    pub results: Vec<R>,
}

/// The program or library whose speed it is.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Tool {
    /// "effnetv2", or a peer's name.
    pub name: String,
    /// Its version.
    pub version: String,
    /// The commit that it was built from, or "unknown".
    pub commit: String,
}

impl<R> Report<R> {
    /// The report of this process, of now.
    pub fn new(machine: Machine, results: Vec<R>) -> Self {
        let tool = Tool {
            name: env!("CARGO_PKG_NAME").into(),
            version: env!("CARGO_PKG_VERSION").into(),
            commit: commit(),
        };
        let command = std::env::args().skip(1).collect();
        let seconds = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |passed| passed.as_secs());
        Self { schema: SCHEMA, command, tool, machine, date: date(seconds), results }
    }
}

impl<R: Serialize> Report<R> {
    /// Writes the report as JSON, over what was there.
    ///
    /// # Errors
    /// [`Error::Io`] when the file cannot be written, [`Error::File`] when a result cannot be JSON.
    pub fn write(&self, path: &Path) -> Result<()> {
        let mut text =
            serde_json::to_string_pretty(self).map_err(|error| Error::file(path, error.to_string()))?;
        text.push('\n');
        fs::write(path, text).map_err(Error::io(path, "write"))
    }
}

/// Seconds since 1970 as a date and time, UTC.
fn date(seconds: u64) -> String {
    let (mut days, second) = (seconds / 86_400, seconds % 86_400);
    let is_leap =
        |year: u64| (year.is_multiple_of(4) && !year.is_multiple_of(100)) || year.is_multiple_of(400);
    let mut year = 1970;
    while days >= 365 + u64::from(is_leap(year)) {
        days -= 365 + u64::from(is_leap(year));
        year += 1;
    }
    let mut month = 1;
    for length in [31, 28 + u64::from(is_leap(year)), 31, 30, 31, 30, 31, 31, 30, 31, 30, 31] {
        if days < length {
            break;
        }
        days -= length;
        month += 1;
    }
    let day = days + 1;
    let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}Z")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates() {
        for (seconds, text) in [
            (0, "1970-01-01T00:00:00Z"),
            (951_782_399, "2000-02-28T23:59:59Z"),
            (951_782_400, "2000-02-29T00:00:00Z"),
            (1_709_251_200, "2024-03-01T00:00:00Z"),
            (1_735_689_599, "2024-12-31T23:59:59Z"),
            (4_107_542_400, "2100-03-01T00:00:00Z"),
        ] {
            assert_eq!(date(seconds), text);
        }
    }

    #[test]
    fn a_report_comes_back_from_its_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("report.json");
        let report = Report::new(Machine::cpu(), vec![(String::from("a"), 0.1)]);
        report.write(&path).unwrap();
        let text = fs::read_to_string(&path).unwrap();
        assert_eq!(serde_json::from_str::<Report<(String, f64)>>(&text).unwrap(), report);
        assert!(report.machine.threads > 0 && report.tool.name == "effnetv2", "{text}");
        assert!(report.write(&folder.path().join("none/report.json")).is_err());
    }
}
