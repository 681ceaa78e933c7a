//! xenio
#![forbid(unsafe_code)]
pub mod features;
pub mod limit;
pub mod machine;
pub mod paths;
pub mod problem;
