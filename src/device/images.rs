//! What build.rs embedded: a fat binary for each family, and which images each of them holds.

#![forbid(unsafe_code)]

use std::fmt::{self, Display, Formatter};

mod embedded {
    include!(concat!(env!("OUT_DIR"), "/embedded.rs"));
}

/// The CUDA toolkit (major, minor) that compiled the kernels; none if there was no nvcc.
pub fn toolkit() -> Option<(u32, u32)> {
    embedded::TOOLKIT
}

/// The oldest driver, as (major, minor) of CUDA, that can load what was embedded: any of the toolkit's major version
/// (CUDA's minor version compatibility), and 12.4 for compressed images.
pub(super) fn needed_driver() -> Option<(u32, u32)> {
    toolkit().map(|(major, _)| (major, 0).max((12, 4)))
}

/// The fat binary of `family`, if it was compiled.
pub(super) fn fat_binary(family: &str) -> Option<&'static [u8]> {
    embedded::IMAGES.iter().find(|(name, _)| *name == family).map(|(_, image)| *image)
}

/// The images in each fat binary, in the order of `EFFNETV2_CUDA_ARCHS`; none if nothing was compiled.
pub fn embedded_images() -> Vec<Image> {
    embedded::ARCHS.iter().filter_map(|name| Image::parse(name)).collect()
}

/// One image of a fat binary.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Image {
    /// The compute capability it is for.
    pub capability: (u32, u32),
    /// Only exactly that capability (`90a`): it uses instructions that no other has.
    pub exact: bool,
    /// PTX, which the driver compiles for any GPU that is at least as new.
    pub ptx: bool,
}

impl Image {
    fn parse(name: &str) -> Option<Self> {
        let (name, ptx) = name.strip_suffix("+ptx").map_or((name, false), |name| (name, true));
        let digits = name.trim_end_matches(char::is_alphabetic);
        let number: u32 = digits.parse().ok()?;
        Some(Self { capability: (number / 10, number % 10), exact: digits.len() < name.len(), ptx })
    }

    /// Whether a GPU of this compute capability can run it: machine code runs on the same major version with the same
    /// or a later minor one, PTX on everything later.
    pub fn fits(&self, capability: (u32, u32)) -> bool {
        if self.exact {
            self.capability == capability
        } else if self.ptx {
            self.capability <= capability
        } else {
            self.capability.0 == capability.0 && self.capability.1 <= capability.1
        }
    }

    /// The one of `images` that a GPU runs: machine code before PTX, the newest that fits first.
    pub fn best(images: &[Self], capability: (u32, u32)) -> Option<Self> {
        let fitting = images.iter().copied().filter(|image| image.fits(capability));
        fitting.max_by_key(|image| (!image.ptx, image.capability, image.exact))
    }
}

impl Display for Image {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let kind = if self.ptx { "compute" } else { "sm" };
        let suffix = if self.exact { "a" } else { "" };
        write!(f, "{kind}_{}{}{suffix}", self.capability.0, self.capability.1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_gpu_finds_its_image() {
        let images: Vec<Image> = ["80", "86", "89", "90a", "100", "120", "80+ptx"]
            .iter()
            .map(|name| Image::parse(name).unwrap())
            .collect();
        let best = |major, minor| Image::best(&images, (major, minor)).map(|image| image.to_string());
        for (capability, expected) in [
            ((8, 0), "sm_80"),
            ((8, 6), "sm_86"),
            ((8, 7), "sm_86"),
            ((8, 9), "sm_89"),
            ((9, 0), "sm_90a"),
            ((10, 0), "sm_100"),
            ((10, 3), "sm_100"),
            ((11, 0), "compute_80"),
            ((12, 1), "sm_120"),
        ] {
            assert_eq!(best(capability.0, capability.1).as_deref(), Some(expected), "{capability:?}");
        }
        assert_eq!(best(7, 5), None);
        // Without PTX nothing runs what has no machine code.
        assert_eq!(Image::best(&images[..6], (11, 0)), None);
    }
}
