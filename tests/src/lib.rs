//! The language the lab and its host speak.
