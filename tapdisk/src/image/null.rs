//! An image without a file: reads give zeros, writes are forgotten. It measures the way of a request to the image and back.

use super::Extent;

/// The image; its size is the disk's.
#[derive(Debug)]
pub struct Null;

impl Null {
    /// Where sectors lie: nowhere.
    pub fn map(&self, count: u32) -> Extent {
        Extent::Zero { count }
    }
}
