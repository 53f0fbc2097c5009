//! Integers and orders from a [`Stream`]. Written out, because a checkpoint must resume with the same order whatever
//! version of a random library is compiled in.

use crate::random::Stream;

/// Uniform in `0..bound` by multiply and shift; the bias is below `bound` · 2⁻³².
pub(super) fn below(stream: &mut Stream, bound: u32) -> u32 {
    ((u64::from(stream.bits()) * u64::from(bound)) >> 32) as u32
}

/// Puts `items` into random order (Fisher and Yates).
pub(super) fn shuffle<T>(stream: &mut Stream, items: &mut [T]) {
    for last in (1..items.len()).rev() {
        items.swap(last, below(stream, last as u32 + 1) as usize);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::Purpose;

    #[test]
    fn every_order_of_three_is_equally_likely() {
        let mut counts = std::collections::HashMap::new();
        for epoch in 0..6000 {
            let mut items = [0, 1, 2];
            shuffle(&mut Stream::new(1, epoch, 0, Purpose::Shuffle), &mut items);
            *counts.entry(items).or_insert(0) += 1;
        }
        // 1000 expected, standard deviation 29.
        assert!(counts.len() == 6 && counts.values().all(|n| (870..=1130).contains(n)), "{counts:?}");
    }

    #[test]
    fn below_reaches_both_ends() {
        let mut stream = Stream::new(2, 0, 0, Purpose::Crop);
        let draws: Vec<u32> = (0..200).map(|_| below(&mut stream, 5)).collect();
        assert_eq!((draws.iter().min(), draws.iter().max()), (Some(&0), Some(&4)));
    }
}
