//! The proofs of the CPU reference, a file for each family of operations and one for the blocks made of them.
//!
//! They are one program because the reference is generic: each program compiles anew what it uses of it.

mod batch_norm;
mod blocks;
mod common;
mod conv3x3;
mod depthwise;
mod head;
mod pointwise;
mod squeeze_excite;
mod threads;
