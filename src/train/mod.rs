//! The training recipe.

pub mod progressive;
pub mod schedule;
