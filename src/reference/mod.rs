//! The CPU reference of every kernel: generic over f32 and f64, composed of textbook operations, readable first.

pub mod optimizer;
