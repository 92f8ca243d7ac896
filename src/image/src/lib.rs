//! Skeleton.
pub mod unpack;
