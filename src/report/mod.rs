//! What a run leaves for people to read: tables, curves, confusion matrices, and the metrics they are drawn from.

#![forbid(unsafe_code)]

mod axis;
pub mod bars;
mod canvas;
pub mod confusion;
pub mod curves;
pub mod metrics;
pub mod table;
