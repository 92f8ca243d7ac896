//! ImageService: one function per call.
