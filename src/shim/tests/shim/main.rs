//! A real shim on a real kernel, driven through its socket. As root; everything made is private and removed.
//! `CRISP_SHIM` names another binary than the one that cargo has built, to measure the one that ships.

#![allow(clippy::unwrap_used)]

mod fixture;

mod conventions;
mod execs;
mod life;
mod logs;
mod process;
