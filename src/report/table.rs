//! Tables in plain text, and numbers as people read them.
//!
//! ```
//! use effnetv2::report::table::{Column, Table, thousands};
//!
//! let mut table = Table::new([Column::left("layer"), Column::right("parameters")]);
//! table.row(["stem".into(), thousands(696)]);
//! table.row(["head".into(), thousands(1_281_000)]);
//! table.totals(["total".into(), thousands(1_281_696)]);
//! assert_eq!(
//!     table.to_string(),
//!     "layer  parameters\n\
//!      ─────  ──────────\n\
//!      stem          696\n\
//!      head    1,281,000\n\
//!      ─────  ──────────\n\
//!      total   1,281,696\n"
//! );
//! ```

use std::fmt;

const GAP: &str = "  ";

/// The heading of a column and the side its cells lean to.
#[derive(Clone, Debug)]
pub struct Column {
    heading: String,
    right: bool,
}

impl Column {
    /// A column of words.
    pub fn left(heading: impl Into<String>) -> Self {
        Self { heading: heading.into(), right: false }
    }

    /// A column of numbers.
    pub fn right(heading: impl Into<String>) -> Self {
        Self { heading: heading.into(), right: true }
    }
}

/// A table of `N` columns; [`fmt::Display`] prints it, each line ended by a line break and no blanks before it.
#[derive(Clone, Debug)]
pub struct Table<const N: usize> {
    columns: [Column; N],
    rows: Vec<[String; N]>,
    totals: Option<[String; N]>,
}

impl<const N: usize> Table<N> {
    /// A table without rows.
    pub fn new(columns: [Column; N]) -> Self {
        Self { columns, rows: Vec::new(), totals: None }
    }

    /// Adds a row below the others.
    pub fn row(&mut self, cells: [String; N]) -> &mut Self {
        self.rows.push(cells);
        self
    }

    /// Sets the row that a rule sets apart at the bottom.
    pub fn totals(&mut self, cells: [String; N]) -> &mut Self {
        self.totals = Some(cells);
        self
    }

    fn line(&self, f: &mut fmt::Formatter<'_>, cells: [&str; N], widths: [usize; N]) -> fmt::Result {
        let mut line = String::new();
        for ((cell, width), column) in cells.iter().zip(widths).zip(&self.columns) {
            let padded = if column.right { format!("{cell:>width$}") } else { format!("{cell:<width$}") };
            line.push_str(&padded);
            line.push_str(GAP);
        }
        writeln!(f, "{}", line.trim_end())
    }
}

impl<const N: usize> fmt::Display for Table<N> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let headings = self.columns.each_ref().map(|column| column.heading.as_str());
        let mut widths = headings.map(|heading| heading.chars().count());
        for row in self.rows.iter().chain(&self.totals) {
            for (width, cell) in widths.iter_mut().zip(row) {
                *width = (*width).max(cell.chars().count());
            }
        }
        let rules = widths.map(|width| "─".repeat(width));
        let rule = rules.each_ref().map(String::as_str);
        self.line(f, headings, widths)?;
        self.line(f, rule, widths)?;
        for row in &self.rows {
            self.line(f, row.each_ref().map(String::as_str), widths)?;
        }
        if let Some(totals) = &self.totals {
            self.line(f, rule, widths)?;
            self.line(f, totals.each_ref().map(String::as_str), widths)?;
        }
        Ok(())
    }
}

/// `21458488` as "21,458,488".
pub fn thousands(value: u64) -> String {
    let digits = value.to_string();
    let mut text = String::with_capacity(digits.len() + digits.len() / 3);
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// Three significant digits with a decimal prefix: `si(8.37e9, "MAC")` is "8.37 GMAC", `si(9.7e-5, "s")` "97.0 µs".
pub fn si(value: f64, unit: &str) -> String {
    const PREFIXES: [&str; 11] = ["p", "n", "µ", "m", "", "k", "M", "G", "T", "P", "E"];
    prefixed(value, 1000.0, &PREFIXES, 4, unit)
}

/// Three significant digits with a binary prefix: `bytes(1.5 · 2³⁰)` is "1.50 GiB".
pub fn bytes(value: u64) -> String {
    const PREFIXES: [&str; 7] = ["", "Ki", "Mi", "Gi", "Ti", "Pi", "Ei"];
    if value < 1024 {
        return format!("{value} B");
    }
    prefixed(value as f64, 1024.0, &PREFIXES, 0, "B")
}

/// `0.83927` as "83.93 %".
pub fn percent(share: f64) -> String {
    format!("{:.2} %", 100.0 * share)
}

/// Seconds as the two largest units: "3 d 04 h", "2 h 05 min", "7 min 09 s", "42.0 s".
pub fn duration(seconds: f64) -> String {
    if !(0.0..1e15).contains(&seconds) {
        return format!("{seconds} s");
    }
    if seconds < 59.95 {
        return format!("{seconds:.1} s");
    }
    let whole = seconds.round() as u64;
    let (minutes, hours, days) = (whole / 60, whole / 3600, whole / 86_400);
    match (days, hours) {
        (0, 0) => format!("{minutes} min {:02} s", whole % 60),
        (0, _) => format!("{hours} h {:02} min", minutes % 60),
        _ => format!("{days} d {:02} h", hours % 24),
    }
}

/// `prefixes[one]` is the empty one.
fn prefixed(value: f64, base: f64, prefixes: &[&str], one: usize, unit: &str) -> String {
    if value == 0.0 || !value.is_finite() {
        return format!("{value} {unit}");
    }
    let mut at = one;
    let mut scaled = value;
    // What would print as 1000 (or 1024) goes to the next prefix. Half of the last printed digit decides.
    while scaled.abs() >= base - 0.5 && at + 1 < prefixes.len() {
        scaled /= base;
        at += 1;
    }
    while scaled.abs() < 0.9995 && at > 0 {
        scaled *= base;
        at -= 1;
    }
    let places = match scaled.abs() {
        x if x < 9.995 => 2,
        x if x < 99.95 => 1,
        _ => 0,
    };
    format!("{scaled:.places$} {}{unit}", prefixes[at])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_lean_and_letters_count() {
        let mut table = Table::new([Column::left("größe"), Column::right("n"), Column::left("note")]);
        table.row(["a".into(), "1,000".into(), "x".into()]).row(["ßßßßßß".into(), "2".into(), String::new()]);
        assert_eq!(
            table.to_string(),
            "größe       n  note\n──────  ─────  ────\na       1,000  x\nßßßßßß      2\n"
        );
        table.totals(["all".into(), "1,002".into(), "wider".into()]);
        assert_eq!(
            table.to_string(),
            "größe       n  note\n──────  ─────  ─────\na       1,000  x\nßßßßßß      2\n\
             ──────  ─────  ─────\nall     1,002  wider\n"
        );
    }

    #[test]
    fn a_table_without_rows_shows_its_head() {
        assert_eq!(Table::new([Column::left("a"), Column::right("b")]).to_string(), "a  b\n─  ─\n");
    }

    #[test]
    fn thousands_are_set_apart() {
        for (value, text) in [
            (0, "0"),
            (999, "999"),
            (1000, "1,000"),
            (21_458_488, "21,458,488"),
            (123_456, "123,456"),
            (u64::MAX, "18,446,744,073,709,551,615"),
        ] {
            assert_eq!(thousands(value), text);
        }
    }

    #[test]
    fn prefixes_keep_three_digits() {
        for (value, text) in [
            (0.0, "0 s"),
            (1.0, "1.00 s"),
            (12.34, "12.3 s"),
            (999.4, "999 s"),
            (999.6, "1.00 ks"),
            (9.996, "10.0 s"),
            (99.96, "100 s"),
            (-8.37e9, "-8.37 Gs"),
            (9.7e-5, "97.0 µs"),
            (0.9999, "1.00 s"),
            (0.5, "500 ms"),
            (2e-13, "0.20 ps"),
            (3e22, "30000 Es"),
            (f64::INFINITY, "inf s"),
        ] {
            assert_eq!(si(value, "s"), text, "{value}");
        }
        for (value, text) in
            [(0, "0 B"), (1023, "1023 B"), (1024, "1.00 KiB"), (3 << 29, "1.50 GiB"), (u64::MAX, "16.0 EiB")]
        {
            assert_eq!(bytes(value), text);
        }
    }

    #[test]
    fn durations_take_two_units() {
        for (seconds, text) in [
            (0.04, "0.0 s"),
            (59.94, "59.9 s"),
            (59.96, "1 min 00 s"),
            (429.0, "7 min 09 s"),
            (3599.6, "1 h 00 min"),
            (7500.0, "2 h 05 min"),
            (273_600.0, "3 d 04 h"),
            (-1.0, "-1 s"),
            (f64::NAN, "NaN s"),
        ] {
            assert_eq!(duration(seconds), text);
        }
        assert_eq!(percent(0.83927), "83.93 %");
    }
}
