//! Numbers by chance that are the same each time. Pure.

/// Marsaglia's xorshift, from a seed that is not zero.
#[derive(Debug)]
pub struct Dice(pub u64);

impl Dice {
    /// A number below `sides`, or 0 if there are none.
    pub fn roll(&mut self, sides: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        usize::try_from(self.0 >> 16).unwrap_or(0).checked_rem(sides).unwrap_or(0)
    }

    /// One of some, of which there is at least one.
    pub fn pick<'a, T>(&mut self, all: &'a [T]) -> &'a T {
        &all[self.roll(all.len())]
    }
}
