//! Counter-based random numbers: Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011).
//!
//! A value is a pure function of (seed, epoch, image, purpose), so neither the order of images nor the number of
//! threads nor an interruption can change it, and a kernel can compute the very same bits.

#![forbid(unsafe_code)]

use rand_core::{TryRng, utils};
use std::convert::Infallible;

const ROUNDS: usize = 10;
const MULTIPLIERS: [u32; 2] = [0xD251_1F53, 0xCD9E_8D57];
const WEYL: [u32; 2] = [0x9E37_79B9, 0xBB67_AE85];

/// Philox4x32 with 10 rounds: 128 random bits for a 128-bit counter under a 64-bit key.
#[inline]
pub const fn philox4x32(counter: [u32; 4], key: [u32; 2]) -> [u32; 4] {
    let (mut c, mut k) = (counter, key);
    let mut round = 0;
    while round < ROUNDS {
        let p0 = MULTIPLIERS[0] as u64 * c[0] as u64;
        let p1 = MULTIPLIERS[1] as u64 * c[2] as u64;
        c = [(p1 >> 32) as u32 ^ c[1] ^ k[0], p1 as u32, (p0 >> 32) as u32 ^ c[3] ^ k[1], p0 as u32];
        k = [k[0].wrapping_add(WEYL[0]), k[1].wrapping_add(WEYL[1])];
        round += 1;
    }
    c
}

/// What random numbers are drawn for. Two purposes never share numbers.
#[non_exhaustive]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// Initial weights of the parameter tensor with this index (it stands in for the image).
    Init,
    /// The order of images in an epoch.
    Shuffle,
    /// Which images are held out.
    Split,
    /// Random resized crop.
    Crop,
    /// Horizontal flip.
    Flip,
    /// RandAugment: operations, signs and places.
    RandAugment,
    /// Mixup ratio.
    Mixup,
    /// CutMix box.
    CutMix,
    /// Dropout of the head; one number per feature.
    Dropout,
    /// Stochastic depth of the block with this index.
    DropPath(u16),
}

impl Purpose {
    /// The 32-bit code that enters the counter.
    pub const fn code(self) -> u32 {
        match self {
            Self::Init => 0,
            Self::Shuffle => 1,
            Self::Split => 2,
            Self::Crop => 3,
            Self::Flip => 4,
            Self::RandAugment => 5,
            Self::Mixup => 6,
            Self::CutMix => 7,
            Self::Dropout => 8,
            Self::DropPath(block) => 0x1_0000 | block as u32,
        }
    }
}

/// The random numbers of one (seed, epoch, image, purpose), in order.
#[derive(Clone, Debug)]
pub struct Stream {
    key: [u32; 2],
    counter: [u32; 4],
    block: [u32; 4],
    used: usize,
}

impl Stream {
    /// The stream from its first number on. The counter is `[block, purpose, image, epoch]`, the key is the seed.
    pub const fn new(seed: u64, epoch: u32, image: u32, purpose: Purpose) -> Self {
        Self {
            key: [seed as u32, (seed >> 32) as u32],
            counter: [0, purpose.code(), image, epoch],
            block: [0; 4],
            used: 4,
        }
    }

    /// The next 32 random bits.
    #[inline]
    pub fn bits(&mut self) -> u32 {
        if self.used == 4 {
            self.block = philox4x32(self.counter, self.key);
            self.counter[0] = self.counter[0].wrapping_add(1);
            self.used = 0;
        }
        self.used += 1;
        self.block[self.used - 1]
    }

    /// Uniform in [0, 1), a multiple of 2⁻²⁴: exact in f32.
    #[inline]
    pub fn uniform(&mut self) -> f32 {
        (self.bits() >> 8) as f32 * (1.0 / 16_777_216.0)
    }

    /// Uniform in [low, high).
    pub fn uniform_in(&mut self, low: f64, high: f64) -> f64 {
        low + (high - low) * f64::from(self.uniform())
    }
}

/// For the distributions of `rand_distr` and the shuffles of `rand`.
impl TryRng for Stream {
    type Error = Infallible;

    fn try_next_u32(&mut self) -> Result<u32, Infallible> {
        Ok(self.bits())
    }

    fn try_next_u64(&mut self) -> Result<u64, Infallible> {
        let low = self.bits();
        Ok(u64::from(self.bits()) << 32 | u64::from(low))
    }

    fn try_fill_bytes(&mut self, bytes: &mut [u8]) -> Result<(), Infallible> {
        utils::fill_bytes_via_next_word(bytes, || self.try_next_u32())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The known-answer vectors of the authors' Random123 library (`kat_vectors`, philox4x32 10).
    #[test]
    fn philox_known_answers() {
        assert_eq!(philox4x32([0; 4], [0; 2]), [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]);
        assert_eq!(
            philox4x32([u32::MAX; 4], [u32::MAX; 2]),
            [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]
        );
        assert_eq!(
            philox4x32([0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344], [0xa409_3822, 0x299f_31d0]),
            [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1]
        );
    }

    #[test]
    fn streams_differ_in_every_coordinate() {
        let base = Stream::new(1, 2, 3, Purpose::Flip).bits();
        for other in [
            Stream::new(2, 2, 3, Purpose::Flip),
            Stream::new(1, 3, 3, Purpose::Flip),
            Stream::new(1, 2, 4, Purpose::Flip),
            Stream::new(1, 2, 3, Purpose::Crop),
            Stream::new(1, 2, 3, Purpose::DropPath(4)),
        ] {
            assert_ne!(base, other.clone().bits());
        }
    }

    #[test]
    fn uniform_covers_the_unit_interval() {
        let mut stream = Stream::new(7, 0, 0, Purpose::Dropout);
        let draws: Vec<f32> = (0..10_000).map(|_| stream.uniform()).collect();
        assert!(draws.iter().all(|u| (0.0..1.0).contains(u)));
        let mean = draws.iter().sum::<f32>() / 10_000.0;
        assert!((mean - 0.5).abs() < 0.01, "mean {mean}");
    }
}
