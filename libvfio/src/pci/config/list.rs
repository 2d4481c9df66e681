//! The two linked lists of capabilities, walked so that no list, however broken, is followed for
//! ever. Works on bytes alone; never panics.

use std::collections::BTreeSet;
use std::fmt;

use serde::Serialize;

use super::ConfigProblem;
use super::bytes::Bytes;

/// Which of the two lists of capabilities.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum List {
    /// The list in the first 256 bytes.
    Conventional,
    /// The list from 0x100 on.
    Extended,
}

impl fmt::Display for List {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Conventional => "capability",
            Self::Extended => "extended capability",
        })
    }
}

/// One member of a list, not parsed yet.
pub(super) struct Node<'a> {
    list: List,
    at: u16,
    /// Which capability it is.
    pub(super) id: u16,
    /// Its version; 0 in the conventional list, which has none.
    pub(super) version: u8,
    next: u16,
    /// Its registers, from its own start.
    pub(super) bytes: Bytes<'a>,
}

impl<'a> Node<'a> {
    /// `None` if the list ends here, which only an extended list does by a member.
    fn read(list: List, at: u16, all: Bytes<'a>) -> Option<Result<Self, ConfigProblem>> {
        let bytes = all.from(at);
        let head = match list {
            List::Conventional => bytes.u16(0).map(u32::from),
            List::Extended => bytes.u32(0),
        };
        let truncated = ConfigProblem::Truncated { coverage: all.0.len() };
        let Some(head) = head else { return Some(Err(truncated)) };
        let [first, second, third, fourth] = head.to_le_bytes();
        let node = match list {
            List::Conventional => {
                Self { list, at, id: first.into(), version: 0, next: second.into(), bytes }
            }
            List::Extended => Self {
                list,
                at,
                id: u16::from_le_bytes([first, second]),
                version: third & 0xf,
                next: u16::from_le_bytes([third, fourth]) >> 4,
                bytes,
            },
        };
        // The kernel, too, stops at a head of 0 and at the number 0xff (`pci_find_next_capability`
        // and `pci_find_next_ext_capability`, `drivers/pci/pci.c`).
        match (list, head) {
            (List::Extended, 0) => None,
            (List::Extended, u32::MAX) => Some(Err(ConfigProblem::Unreadable { list, at })),
            (List::Conventional, _) if node.id == 0xff => {
                Some(Err(ConfigProblem::Unreadable { list, at }))
            }
            _ => Some(Ok(node)),
        }
    }

    /// Parses the member; it is cut short if `parse` misses a register.
    pub(super) fn parse<T>(&self, parse: impl Fn(&Self) -> Option<T>) -> Result<T, ConfigProblem> {
        parse(self).ok_or(ConfigProblem::CutShort { list: self.list, at: self.at })
    }
}

/// The members of a list, up to its end or the first thing wrong with it.
pub(super) struct Walk<'a> {
    list: List,
    pointer: u16,
    bytes: Bytes<'a>,
    seen: BTreeSet<u16>,
}

impl<'a> Walk<'a> {
    /// From the pointer `start`; 0 is an empty list.
    pub(super) fn new(list: List, start: u16, bytes: Bytes<'a>) -> Self {
        Self { list, pointer: start, bytes, seen: BTreeSet::new() }
    }
}

impl<'a> Iterator for Walk<'a> {
    type Item = Result<Node<'a>, ConfigProblem>;

    fn next(&mut self) -> Option<Self::Item> {
        let list = self.list;
        // The low bits are reserved and to be ignored. Taking the pointer ends the walk unless a
        // sound member says where it goes on.
        let pointer = std::mem::take(&mut self.pointer) & !3;
        let floor = match list {
            List::Conventional => 0x40,
            List::Extended => 0x100,
        };
        if pointer == 0 {
            return None;
        }
        if pointer < floor {
            return Some(Err(ConfigProblem::PointerOutOfRange { list, pointer }));
        }
        if !self.seen.insert(pointer) {
            return Some(Err(ConfigProblem::PointerLoop { list, pointer }));
        }
        let node = Node::read(list, pointer, self.bytes)?;
        if let Ok(node) = &node {
            self.pointer = node.next;
        }
        Some(node)
    }
}
