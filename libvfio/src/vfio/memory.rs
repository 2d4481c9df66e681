//! Device memory that is mapped: zeros over all of it, and whether they are there. Reads and writes
//! what it is given, and nothing else.

use std::ffi::c_void;
use std::hash::{BuildHasher, RandomState};
use std::iter;
use std::ptr::NonNull;
use std::sync::atomic::{Ordering, fence};
use std::time::Instant;

use crate::scrub::ReadBack;

/// Bytes of what is looked at together.
pub(super) const PAGE: usize = 4096;
/// Words of that.
const WORDS: usize = PAGE / size_of::<Word>();
/// Pages whose samples are drawn together: as many as there are places in 64 bits.
const DRAWN: usize = (u64::BITS / WORDS.ilog2()) as usize;
/// After how many pages one looks at the clock.
const PAGES_AT_ONCE: usize = 256;

/// What is read at a time: what any instruction reads at once, and a hypervisor carries out that stands
/// in for the device, whatever the compiler makes of it.
type Word = u64;

/// What is written at a time where that is nothing but moved: the widest that every processor has, and
/// such a hypervisor knows (`arch/x86/kvm/emulate.c`).
#[cfg(target_arch = "x86_64")]
type Wide = std::arch::x86_64::__m128i;
#[cfg(not(target_arch = "x86_64"))]
type Wide = Word;
// SAFETY: any bits are one.
const ZEROS: Wide = unsafe { std::mem::zeroed() };

/// Memory of a device, or any other, that is mapped.
///
/// By words of a size that a device takes, aligned, each of them read or written once and in order:
/// what sets ordinary memory may use instructions that a device's does not take, and what is read has
/// to come from the device. No reference to it is ever made, for it may change by itself.
#[derive(Debug)]
pub struct Memory {
    first: NonNull<Wide>,
    pages: usize,
}

/// What is wrong with memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wrong {
    /// The word at this offset is not what was written there.
    Forgets(usize),
    /// Something else than zeros is in the page, or the word, at this offset.
    Left(usize),
    /// Time was up before all of it was done.
    Late,
}

impl Memory {
    /// The whole pages among `bytes` that are mapped at `first`.
    ///
    /// # Safety
    ///
    /// They are mapped for reading and writing and begin with a page, are plain memory without side
    /// effects, and are nobody else's, all for as long as this is used.
    pub unsafe fn at(first: NonNull<c_void>, bytes: usize) -> Self {
        Self { first: first.cast(), pages: bytes / PAGE }
    }

    /// Zeros all of it, and looks at it as far as it is to be looked at; the first thing that is wrong.
    pub fn clear(&mut self, read_back: ReadBack, until: Instant) -> Result<(), Wrong> {
        self.overwrite(until)?;
        self.look(read_back, until)
    }

    /// Zeros all of it, having seen that it is there.
    pub fn overwrite(&mut self, until: Instant) -> Result<(), Wrong> {
        self.keeps()?;
        self.each(until, |memory, page| {
            memory.zero(page);
            Ok(())
        })
    }

    /// Whether it reads zeros, as far as it is to be looked at.
    pub fn look(&self, read_back: ReadBack, until: Instant) -> Result<(), Wrong> {
        // Nothing is read before everything is written.
        fence(Ordering::SeqCst);
        match read_back {
            ReadBack::Full => self.each(until, |memory, page| {
                memory.is_clear(page).then_some(()).ok_or(Wrong::Left(page * PAGE))
            }),
            ReadBack::Sampled => {
                // Keyed anew each time by the system's random numbers.
                let keys = RandomState::new();
                self.sample(until, |draw| keys.hash_one(draw))
            }
        }
    }

    /// Looks at the first and the last word, and at one of each page, wherever `chance` has it.
    fn sample(&self, until: Instant, chance: impl Fn(usize) -> u64) -> Result<(), Wrong> {
        let look = |place: usize| {
            let clear = self.read(place) == 0;
            clear.then_some(()).ok_or(Wrong::Left(place * size_of::<Word>()))
        };
        let Some(last) = (self.pages * WORDS).checked_sub(1) else { return Ok(()) };
        look(0)?;
        look(last)?;
        let mut drawn = 0;
        self.each(until, |_, page| {
            if page % DRAWN == 0 {
                drawn = chance(page / DRAWN);
            }
            let place = usize::try_from(drawn % WORDS as u64).unwrap_or(0);
            drawn /= WORDS as u64;
            look(page * WORDS + place)
        })
    }

    /// Whether it keeps what is written: words that nobody can foresee, at its beginning, at its end and
    /// at every distance that is one line of its address. What ignores writes and reads zeros would
    /// otherwise pass for clear, and what shows the same memory twice for all of it.
    fn keeps(&mut self) -> Result<(), Wrong> {
        let words = self.pages * WORDS;
        let Some(last) = words.checked_sub(1) else { return Ok(()) };
        let lines = (0..usize::BITS).map(|line| 1 << line).take_while(|place| *place < last);
        let places = iter::once(0).chain(lines).chain([last]);
        let keys = RandomState::new();
        let mark = |place: usize| keys.hash_one(place) | 1;
        for place in places.clone() {
            self.write(place, mark(place));
        }
        fence(Ordering::SeqCst);
        let mut others = places.filter(|place| self.read(*place) != mark(*place));
        others.next().map_or(Ok(()), |place| Err(Wrong::Forgets(place * size_of::<Word>())))
    }

    /// Does something with each page, as long as there is time.
    fn each(
        &self,
        until: Instant,
        mut work: impl FnMut(&Self, usize) -> Result<(), Wrong>,
    ) -> Result<(), Wrong> {
        for page in 0..self.pages {
            if page % PAGES_AT_ONCE == 0 && Instant::now() >= until {
                return Err(Wrong::Late);
            }
            work(self, page)?;
        }
        Ok(())
    }

    fn zero(&self, page: usize) {
        let wide = PAGE / size_of::<Wide>();
        let first = self.first.as_ptr().wrapping_add(page * wide);
        for at in (0..wide).step_by(8) {
            let zero = |place| {
                // SAFETY: within the page, as whoever made this promised.
                unsafe { first.wrapping_add(at + place).write_volatile(ZEROS) };
            };
            // By hand: a compiler that is to save space would not.
            zero(0);
            zero(1);
            zero(2);
            zero(3);
            zero(4);
            zero(5);
            zero(6);
            zero(7);
        }
    }

    /// Whether all of a page reads zeros.
    fn is_clear(&self, page: usize) -> bool {
        let (first, mut all) = (page * WORDS, 0);
        for at in (first..first + WORDS).step_by(8) {
            let two = |place| self.read(at + place) | self.read(at + place + 1);
            all |= two(0) | two(2) | two(4) | two(6);
        }
        all == 0
    }

    fn read(&self, place: usize) -> Word {
        debug_assert!(place < self.pages * WORDS);
        // SAFETY: a word of what is mapped, as whoever made this promised.
        unsafe { self.first.as_ptr().cast::<Word>().wrapping_add(place).read_volatile() }
    }

    fn write(&self, place: usize, word: Word) {
        debug_assert!(place < self.pages * WORDS);
        // SAFETY: likewise.
        unsafe { self.first.as_ptr().cast::<Word>().wrapping_add(place).write_volatile(word) };
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::num::NonZeroUsize;
    use std::os::fd::OwnedFd;
    use std::time::Duration;

    use nix::sys::memfd::{MFdFlags, memfd_create};
    use nix::sys::mman::{MapFlags, ProtFlags, mmap, mmap_anonymous};
    use nix::unistd::ftruncate;

    use super::*;

    const READ_BACKS: [ReadBack; 2] = [ReadBack::Full, ReadBack::Sampled];

    /// Ordinary memory, which stays mapped.
    fn memory(pages: usize, filled: u8) -> Memory {
        let size = NonZeroUsize::new(pages * PAGE).unwrap();
        let access = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: new memory, of nobody else.
        let first = unsafe { mmap_anonymous(None, size, access, MapFlags::MAP_PRIVATE) }.unwrap();
        // SAFETY: all of it is there.
        unsafe { first.as_ptr().cast::<u8>().write_bytes(filled, size.get()) };
        // SAFETY: it stays.
        unsafe { Memory::at(first, size.get()) }
    }

    fn soil(memory: &Memory, word: usize) {
        memory.write(word, 1 << 63);
    }

    fn soon() -> Instant {
        Instant::now() + Duration::from_secs(60)
    }

    #[test]
    fn every_word_is_cleared() {
        for read_back in READ_BACKS {
            let mut memory = memory(1030, 0xff);
            assert_eq!(memory.look(read_back, soon()), Err(Wrong::Left(0)));
            assert_eq!(memory.clear(read_back, soon()), Ok(()));
            for word in 0..1030 * WORDS {
                assert_eq!(memory.read(word), 0, "{word}");
            }
        }
    }

    #[test]
    fn any_word_that_is_left_is_found_where_all_are_read() {
        let memory = memory(3, 0);
        for word in 0..3 * WORDS {
            soil(&memory, word);
            let found = memory.look(ReadBack::Full, soon());
            assert_eq!(found, Err(Wrong::Left(word / WORDS * PAGE)));
            memory.write(word, 0);
        }
        assert_eq!(memory.look(ReadBack::Full, soon()), Ok(()));
    }

    #[test]
    fn a_page_that_is_left_is_found_by_samples_and_so_are_both_ends() {
        const PAGES: usize = 300;
        let memory = memory(PAGES, 0);
        for page in [0, 1, 255, 256, PAGES - 1] {
            let words = page * WORDS..(page + 1) * WORDS;
            words.clone().for_each(|word| soil(&memory, word));
            let found = memory.look(ReadBack::Sampled, soon());
            assert!(matches!(found, Err(Wrong::Left(at)) if at / PAGE == page), "{found:?}");
            words.for_each(|word| memory.write(word, 0));
        }
        for word in [0, PAGES * WORDS - 1] {
            soil(&memory, word);
            let found = memory.look(ReadBack::Sampled, soon());
            assert_eq!(found, Err(Wrong::Left(word * size_of::<Word>())));
            memory.write(word, 0);
        }
        assert_eq!(memory.look(ReadBack::Sampled, soon()), Ok(()));
    }

    #[test]
    fn each_word_of_each_page_is_as_likely_a_sample_as_any_other() {
        let pages = 2 * DRAWN + 1;
        let memory = memory(pages, 0);
        let words = WORDS as u64;
        // The same place in each of the pages that are drawn together.
        let everywhere = |place| (0..DRAWN).fold(0, |drawn, _| drawn * words + place);
        for page in [0, 1, DRAWN - 1, DRAWN, pages - 2] {
            soil(&memory, page * WORDS + 5);
            let found = |place| memory.sample(soon(), |_| everywhere(place)).is_err();
            assert_eq!((0..words).filter(|place| found(*place)).collect::<Vec<_>>(), [5], "{page}");
            memory.write(page * WORDS + 5, 0);
        }
    }

    #[test]
    fn it_is_no_use_to_know_where_was_looked_the_last_time() {
        let memory = memory(1, 0);
        let mut found = BTreeSet::new();
        soil(&memory, 7);
        for _ in 0..20 * WORDS {
            found.insert(memory.look(ReadBack::Sampled, soon()).is_err());
        }
        assert_eq!(found.len(), 2, "always or never");
    }

    #[test]
    fn what_shows_less_memory_than_it_is_big_is_not_clear() {
        let file: OwnedFd = memfd_create("memory", MFdFlags::empty()).unwrap();
        ftruncate(&file, i64::try_from(4 * PAGE).unwrap()).unwrap();
        let (all, half) =
            (NonZeroUsize::new(8 * PAGE).unwrap(), NonZeroUsize::new(4 * PAGE).unwrap());
        let access = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: new memory, of nobody else.
        let first = unsafe { mmap_anonymous(None, all, access, MapFlags::MAP_PRIVATE) }.unwrap();
        let start = first.as_ptr() as usize;
        for place in [start, start + 4 * PAGE] {
            let flags = MapFlags::MAP_SHARED | MapFlags::MAP_FIXED;
            // SAFETY: in the place of a half of that.
            unsafe { mmap(NonZeroUsize::new(place), half, access, flags, &file, 0) }.unwrap();
        }
        // SAFETY: it stays.
        let mut memory = unsafe { Memory::at(first, all.get()) };
        for read_back in READ_BACKS {
            assert_eq!(memory.clear(read_back, soon()), Err(Wrong::Forgets(0)));
        }
    }

    #[test]
    fn no_longer_than_it_may_take() {
        let mut memory = memory(1, 0);
        let now = Instant::now();
        for read_back in READ_BACKS {
            assert_eq!(memory.look(read_back, now), Err(Wrong::Late));
        }
        assert_eq!(memory.overwrite(now), Err(Wrong::Late));
    }
}
