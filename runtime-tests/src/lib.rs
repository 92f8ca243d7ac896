//! Fixtures for tests of the real daemon, the real shim and the real kernel, driven through the CRI socket and by
//! signals, never from inside. Reading order: where things are (`place`, `setup`, `build`), what runs (`daemon`,
//! `containerd`, `registry`, `image`), what drives it (`client`, `crictl`, `critest`, `kubelet`, `streams`), what is measured
//! (`traces`, `bench`, with `spdy`), and what puts it all together (`demo`, `suite`).

pub mod place;
pub mod run;

pub mod build;
pub mod setup;

pub mod containerd;
pub mod daemon;
pub mod http;
pub mod image;
pub mod registry;

pub mod bed;
pub mod client;
pub mod crictl;
pub mod critest;
pub mod kubelet;
pub mod oci;
pub mod streams;

pub mod bench;
pub mod spdy;
pub mod traces;

pub mod demo;
pub mod fuzz;
pub mod suite;
