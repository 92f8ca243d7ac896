//! The OCI runtime spec of a container, from what CRI, image and configuration say.
