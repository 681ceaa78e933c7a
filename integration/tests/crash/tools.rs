//! The command-line tools change an image.
